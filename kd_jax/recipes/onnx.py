"""Adds ONNX graphs to the export of an encoder, float32 and int8, and measures them.

    onnx/model.onnx         float32, checked against kd_jax
    onnx/model_qint8.onnx   weights of 8 bits a channel, activations quantised as they come
    onnx.json               how far the two agree, and how fast they are here

optimum looks for these places and names, and so does sentence-transformers with backend="onnx". A
graph reads what the tokenizer gives, rows and tokens in any number, and makes `logits`; an
embedder's makes `sentence_embedding`, the finished vectors, beside `last_hidden_state`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import itertools
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import encoded, python
from kd_jax.errors import UserError
from kd_jax.metrics import cost, embedding
from kd_jax.models import embedder, family, hf
from kd_jax.models.blueprint import Blueprint, count
from kd_jax.precision import Policy
from kd_jax.recipes import export_check
from kd_jax.run import workdir
from kd_jax.types import Batch

log = logging.getLogger(__name__)

FILE = "onnx.json"
PACKAGES = ("torch", "onnx", "onnxruntime")
TEXTS, ROWS, LENGTH = 128, 32, 128  # that are compared; of a batch; most tokens of a text
ALIKE = 0.99  # the least agreement of int8 with float32 that needs no warning
LARGEST = 2000  # megabytes of weights: a file of protobuf holds 2 GiB
_OPSET = 18
_NAMES = {"embedding": "sentence_embedding", "classification": "logits"}  # of what is compared


def check_possible(blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises UserError where a model has no ONNX graph here, or a package is missing."""
    name, head = blueprint.name, blueprint.head
    if blueprint.spec.causal or head not in _NAMES:
        kind = "a decoder" if blueprint.spec.causal else f"an encoder with the head {head!r}"
        raise UserError(
            f"--onnx: {name} is {kind}; ONNX files are made of encoders that classify, score pairs "
            f"or make vectors; leave --onnx out"
        )
    if tokenizer is None:
        raise UserError(f"--onnx: {name} has no tokenizer, and the check of the files reads texts")
    if missing := [each for each in PACKAGES if importlib.util.find_spec(each) is None]:
        raise UserError(
            f"--onnx needs more packages: pip install {' '.join(missing)} (what kd_jax[onnx] lists)"
        )
    if (size := 4e-6 * count(blueprint.abstract().params)) > LARGEST:
        raise UserError(f"--onnx: {name} has {size:,.0f} MB of weights; a file holds {LARGEST:,}")


def add(folder: Path, head: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Writes the two graphs of a checkpoint into its folder, and compares them.

    float32 is compared with kd_jax on a padded batch and on a text alone, int8 with float32 on
    texts that come with Python, pairs of them for a classifier.

    Returns what FILE says: `texts` and `of`, what was read; `agreement`, the name of int8's figure,
    and `least`, what it should be; `machine` and `versions`; and by type in `files` `file`, `mb`,
    `max_difference` (to kd_jax's, int8's to float32's), `throughput` (texts a second in batches of
    ROWS), `latency_ms` of one text, and int8's `agreement`. RuntimeError if float32 differs by more
    than `export_check.TOLERANCE`.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kind, config = family.read(hf.read_config(folder))
    config = embedder.read(config, folder) if head == "embedding" else config
    batches, source = _texts(tokenizer, head, config.max_tokens)
    files = {"float32": folder / "onnx/model.onnx", "int8": folder / "onnx/model_qint8.onnx"}
    exact, small, prepared = *files.values(), folder / "onnx/prepared.onnx"
    exact.parent.mkdir()
    _trace(folder, head, batches[0], exact)
    quant_pre_process(exact, prepared, skip_symbolic_shape=True)
    # Whole 8 bits overflow in the products of x86 CPUs without VNNI: what is measured here would
    # not hold there.
    how = dict(per_channel=True, reduce_range=True, weight_type=quantization.QuantType.QInt8)
    quantization.quantize_dynamic(prepared, small, **how)
    prepared.unlink()

    graphs = {name: _Graph(path, head) for name, path in files.items()}
    found = {name: [graph(batch) for batch in batches] for name, graph in graphs.items()}
    blueprint = Blueprint("", kind, config, head, Policy())
    params = hf.open(folder, kind, config, head)
    by_length = np.argsort(batches[0].mask_BT.sum(1))
    shortest, usual = (_row(batches[0], row) for row in by_length[[0, ROWS // 2]])
    pairs = [  # the same in ONNX Runtime and in kd_jax
        (graphs["float32"](batch), export_check.logits_of(blueprint, params, batch)[:, 0])
        for batch in (batches[0], shortest)
    ]
    exact_NC, small_NC = map(np.concatenate, found.values())
    agreement, value = _agreement(head, exact_NC, small_NC)
    differences = {
        "float32": max(export_check.difference(folder, head, "onnx", *pair) for pair in pairs),
        "int8": float(np.abs(exact_NC - small_NC).max()),
    }
    if not value >= ALIKE:
        log.warning(
            "%s: int8 changes this model: %s %.4f (float32: 1); measure it on your task, or use %s",
            *(small.name, agreement, value, exact.name),
        )
    report = {
        name: {
            "file": str(path.relative_to(folder)),
            "mb": path.stat().st_size / 1e6,
            "max_difference": differences[name],
            **_speed(graphs[name], usual, batches[0]),
        }
        for name, path in files.items()
    }
    report["int8"]["agreement"] = value
    return {
        "texts": len(exact_NC),
        "of": source,
        "agreement": agreement,
        "least": ALIKE,
        "files": report,
        "machine": workdir.machine(),
        "versions": {each: importlib.metadata.version(each) for each in PACKAGES},
    }


def _texts(tokenizer: PreTrainedTokenizerBase, head: str, most: int) -> tuple[list[Batch], str]:
    """Makes batches of ROWS sentences of any lengths, or pairs of sentences; and says whose."""
    documents = python.documents({"path": "reference"}, "onnx")
    words = " ".join(itertools.chain.from_iterable(map(str.split, documents)))
    sentences = [each for each in re.split(r"(?<=[.!?]) ", words) if each.count(" ") > 1]
    first = sentences[:: len(sentences) // TEXTS][:TEXTS]
    second = None if head == "embedding" else sentences[1 :: len(sentences) // TEXTS][:TEXTS]
    labels_N1, length = np.zeros((TEXTS, 1), np.int32), min(LENGTH, most)
    rows = encoded.encode(tokenizer, first, second, labels_N1, length)
    groups = np.arange(TEXTS).reshape(-1, ROWS)
    return [rows.batch(ids_B, int(rows.lengths_N[ids_B].max())) for ids_B in groups], documents.name


def _row(batch: Batch, row: int) -> Batch:
    """Takes one row of a batch, without its padding."""
    length = int(batch.mask_BT[row].sum())
    parts = {"tokens_BT": batch.tokens_BT, "mask_BT": batch.mask_BT, "types_BT": batch.types_BT}
    cut = {k: v if v is None else v[row : row + 1, :length] for k, v in parts.items()}
    return batch.replace(**cut)


def _inputs(batch: Batch) -> dict[str, np.ndarray]:
    """Names what a graph reads as tokenizers do, int64."""
    given = {"input_ids": batch.tokens_BT, "attention_mask": batch.mask_BT}
    given |= {} if batch.types_BT is None else {"token_type_ids": batch.types_BT}
    return {name: np.asarray(each, np.int64) for name, each in given.items()}


def _trace(folder: Path, head: str, batch: Batch, path: Path) -> None:
    """Writes the graph of a checkpoint's PyTorch model.

    The exporter that runs the model once: the one that torch.export feeds needs onnxscript and 15
    times as long. Lengths that it took for constants would fail the comparison on a text alone.
    """
    import torch

    model = export_check.load_in_pytorch(folder, head)
    known = inspect.signature(model.forward).parameters
    given = {k: torch.from_numpy(v) for k, v in _inputs(batch).items() if k in known}

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            named = dict(zip(given, inputs, strict=True))
            output = self.model(**named)
            if head == "classification":
                return output.logits
            hidden = output.last_hidden_state
            return hidden, export_check.torch_vectors(folder, hidden, named["attention_mask"])

    names = [_NAMES[head]] if head == "classification" else ["last_hidden_state", _NAMES[head]]
    axes = {name: {0: "batch", 1: "length"} for name in (*given, "last_hidden_state")}
    with warnings.catch_warnings():  # of the exporter's age, and of constants
        warnings.simplefilter("ignore")
        torch.onnx.export(
            *(Graph().eval(), tuple(given.values()), path),
            input_names=list(given),
            output_names=names,
            dynamic_axes={k: v for k, v in axes.items() if k in given or k in names}
            | {_NAMES[head]: {0: "batch"}},
            opset_version=_OPSET,
            dynamo=False,
        )


class _Graph:
    """A graph in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path, head: str) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._names, self._output = [each.name for each in self._session.get_inputs()], _NAMES[head]

    def __call__(self, batch: Batch) -> np.ndarray:
        """Computes the logits or vectors (B, C) of a batch."""
        given = _inputs(batch)
        return self._session.run([self._output], {name: given[name] for name in self._names})[0]


def _agreement(head: str, exact_NC: np.ndarray, small_NC: np.ndarray) -> tuple[str, float]:
    """Measures how far int8 agrees with float32: 1 where nothing changes."""
    if head == "embedding":
        return "mean cosine", float(embedding.cosines(exact_NC, small_NC).mean())
    if exact_NC.shape[1] == 1:
        return "correlation of scores", float(np.corrcoef(exact_NC[:, 0], small_NC[:, 0])[0, 1])
    return "equal predictions", float((exact_NC.argmax(1) == small_NC.argmax(1)).mean())


def _speed(graph: _Graph, one: Batch, many: Batch) -> dict[str, float]:
    calls = dict(batch_size=ROWS, repeats=50, budget_s=3.0)
    found = cost.measure(lambda: graph(one), lambda: graph(many), **calls)
    return {key: found[key] for key in ("throughput", "latency_ms")}
