"""What tests of scored tasks share: questions in the layouts of their data sets, a tokenizer."""

import functools
import tempfile

from kd_jax.data import tokenizers

_FOLDER = tempfile.TemporaryDirectory(prefix="kd_jax-tokenizer-")
WORDS = "a b dog fox hen man the ran sat saw to bed home quickly again Sentence The . , :"


@functools.cache
def tokenizer():
    """Byte-level BPE that knows some words."""
    return tokenizers.train_tokenizer("bpe", [f"{WORDS} " * 9], 300, _FOLDER.name)


def swag(**changes):
    """A row of HellaSwag."""
    return {
        "ind": 7,
        "activity_label": "Going home",
        "ctx_a": "A man saw the dog.",
        "ctx_b": "the Dog",
        "endings": ["ran home.", "sat [step] to bed.", "saw the  hen.", "quickly sat again."],
        "label": 2,
        "split_type": "indomain",
    } | changes


def book(words=("dog", "fox", "hen"), answer="fox", query="The XXXXX ran home ."):
    """The lines of an example of the Children's Book Test."""
    lines = [f"{n} The man saw the {'dog' if n % 2 else 'hen'} ." for n in range(1, 21)]
    return "\n".join([*lines, f"21 {query}\t{answer}\t\t{'|'.join(words)}"]) + "\n\n"
