"""Where text comes from: `read` turns a part of the config into documents.

A source is a dict with these keys (all but `source` and `path` may be left out):

    source    files | hub | tfds | python: the module kd_jax.data.<source>
    path      files: file, folder (without its hidden files) or glob, or a list of them; hub:
              repository id or local folder; tfds: name/config or the folder of a prepared dataset;
              python: nothing, or "reference"
    name      hub: the dataset's configuration
    split     hub, tfds: split of the dataset; by default train, validation or test, as the config
              key that holds the source is called
    text      the column (key, field) that holds the text
    delimiter files: what separates the columns of a .csv or .tsv, whose fields may then be quoted;
              by default a comma (.csv), or a tab, without any quoting (.tsv)
    revision  hub: branch, tag or commit

A module is a source when it defines `documents(spec, where) -> Documents`; with
`rows(spec, where) -> Table` it gives tables too (data/table.py).
"""

from collections.abc import Callable, Mapping

from kd_jax import plugins
from kd_jax.data.documents import Documents
from kd_jax.errors import UserError
from kd_jax.ranges import settings

DEFAULTS = dict(
    source="files", path=None, name=None, split=None, text="text", delimiter=None, revision=None
)


def read(config: Mapping, where: str) -> Documents:
    """Documents of `config`, which stands at config.<where>, such as "data.train".

    Opens the source and reads its first document, so that most mistakes show at once. Raises
    UserError for whatever is wrong with the config or the source.
    """
    documents, spec = open_source(config, DEFAULTS, where, "documents")
    found = documents(spec, where)
    if next(iter(found), None) is None:
        raise UserError(f"{found.name} (config.{where}) holds no text")
    return found


def open_source(config: Mapping, defaults: dict, where: str, kind: str) -> tuple[Callable, dict]:
    """(the source's function `kind`, the complete settings that it takes)."""
    spec = settings(config, defaults, where)
    if spec["split"] is None:
        spec["split"] = where.rsplit(".", 1)[-1]
    module = plugins.load("data", spec["source"], kind)
    if spec["path"] is None and spec["source"] != "python":
        raise UserError(f"config.{where}.path is not set: source {spec['source']!r} needs it")
    return getattr(module, kind), spec
