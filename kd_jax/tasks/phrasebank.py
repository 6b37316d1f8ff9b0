"""Financial PhraseBank (Malo et al. 2014, arXiv:1307.5336): the sentiment of financial news.

config.task: name, seq_len, and `level`, the share of annotators that agree: AllAgree, 75Agree,
66Agree or 50Agree.

config.data as in data/splits.py, and:
    train       source="files", path: the folder or .zip that holds Sentences_<level>.txt, or the
                file itself (latin-1, `sentence@label`)
    test        the data set ships no test split; None takes one out of train
    test_share  its share of the sentences, stratified
    test_seed   and its seed
"""

import io
import os
import re
import zipfile
import zlib
from pathlib import Path

from kd_jax.data import splits
from kd_jax.errors import UserError
from kd_jax.ranges import Choice, Real, Whole
from kd_jax.tasks.classification import ClassificationTask, Texts, classes
from kd_jax.tasks.task import local

DATA = splits.DATA | dict(
    test_share=Real(above=0, below=1, default=0.2),
    test_seed=Whole(least=0, most=2**32 - 1, default=0),
)
LEVELS = ("AllAgree", "75Agree", "66Agree", "50Agree")
DEFAULTS = dict(name="phrasebank", level=Choice(*LEVELS), seq_len=Whole(least=8, default=128))


class PhraseBank(ClassificationTask):
    """Financial PhraseBank. Most sentences are neutral, so macro F1 selects checkpoints."""

    labels = ("negative", "neutral", "positive")
    metrics = ("macro_f1", "accuracy")
    primary = "macro_f1"
    defaults, data_defaults = DEFAULTS, DATA
    variant, variants = "level", LEVELS

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self.level = self.config["level"]

    @classmethod
    def smoke(cls, task, data, samples):
        return dict(seq_len=16), local(samples / "financial_phrasebank")

    @property
    def splits(self):
        return (*super().splits, "test") if self._shared else super().splits

    @property
    def _shared(self) -> bool:
        """Tells whether train and test come from one file."""
        return self.data["test"] is None and self.data["train"] is not None

    def _read(self, key):
        if not (self._shared and key in ("train", "test")):
            return self._file(key)
        whole, share = self._file("train"), self.data["test_share"]
        test_N = splits.stratified(whole.pairs, whole.labels_N, share, self.data["test_seed"])
        if key == "test":
            return whole.part(test_N, f"{share:.0%} of {whole.name}")
        return whole.part(~test_N, f"{1 - share:.0%} of {whole.name}")

    def _file(self, key) -> Texts:
        where, spec = self._spec(key)
        where = f"config.{where}"
        if spec["source"] != "files" or not isinstance(spec["path"], str | Path):
            raise UserError(
                f"{where}: PhraseBank is read from source='files', with path its folder, its .zip "
                f"or Sentences_{self.level}.txt"
            )
        path = Path(os.path.expanduser(spec["path"]))
        name, content = _content(path, f"Sentences_{self.level}.txt", where)
        level = re.fullmatch(r"Sentences_(\w+)\.txt", Path(name).name)
        if level and level[1] != self.level:
            raise UserError(f"{name} ({where}) is not of config.task.level={self.level!r}")

        def place(row: int) -> str:
            return f"{name}, line {numbers[row]}"

        lines = io.StringIO(content.decode("latin-1"))
        numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
        numbers = [number for number, _ in numbered]
        pairs = [line.rpartition("@") for _, line in numbered]
        if not pairs:
            raise UserError(f"{name} ({where}) holds no sentences")
        known = {label: row for row, label in enumerate(self.labels)}
        labels_N = classes([label for _, _, label in pairs], known, place)
        return Texts(name, [text for text, _, _ in pairs], None, labels_N, place).checked()


def _content(path: Path, wanted: str, where: str) -> tuple[str, bytes]:
    """Reads a file of the data set, alone or in a folder or .zip: (name for messages, bytes)."""
    if path.suffix == ".zip" and path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                # Zips made on a Mac hold a second entry of each name, without the text.
                names = [name for name in archive.namelist() if not name.startswith("__MACOSX")]
                inside = [name for name in names if name.rsplit("/", 1)[-1] == wanted]
                if len(inside) != 1:
                    raise UserError(f"{path} ({where}) holds no {wanted}; have: {', '.join(names)}")
                return f"{path}/{inside[0]}", archive.read(inside[0])
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} ({where}) is no zip, or a damaged one: {error}") from None
        except RuntimeError as error:  # encrypted, or packed in a way that Python does not know
            raise UserError(f"{path} ({where}): {error}; unpack it and name the folder") from None
    file = path / wanted if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} ({where}) does not exist")
    return str(file), file.read_bytes()


make = PhraseBank
