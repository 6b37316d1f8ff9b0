"""Describes models by sections of the config: architecture first, weights only on request."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax import hub
from kd_jax.errors import UserError
from kd_jax.models import block_runs, embedder, family, hf
from kd_jax.models.model_config import Run
from kd_jax.precision import Policy
from kd_jax.types import Array, Counted, Model, ModelSpec, Params

# The config.json of well-known hub ids, so that planning needs no network. Sizes are those of the
# published checkpoints. Among them are the small BERTs of Turc et al. (2019, arXiv:1908.08962),
# stories260K of karpathy/tinyllamas, which is no HF checkpoint, and the language models inside
# Gemma 3 4B, 12B and 27B, whose checkpoints have a vision model as well.
PRESETS = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """The description of a model: family, config, head, types and source of its weights."""

    name: str  # as the config calls it
    family: family.Family
    config: Any
    head: str
    policy: Policy
    folder: Path | None = None  # of a checkpoint
    commit: str | None = None
    table_rows: int = 0  # on the mesh, of tables over the vocabulary, which are padded to them

    @property
    def hf_json(self) -> dict:
        """Returns the keys of the model's config.json."""
        return json.loads(self.config.hf_json)

    @property
    def spec(self) -> ModelSpec:
        return family.spec(self.config)

    @property
    def about(self) -> tuple:
        """Lists what the model's outputs depend on besides its parameters: architecture, types and
        head."""
        shape = json.dumps(family.to_hf(self.family, self.config), sort_keys=True)
        vectors = embedder.vectors(self.config) if self.head == "embedding" else ()
        return (self.family.name, shape, self.policy, self.head, *vectors)

    def abstract(self) -> Model:
        """Makes the model with shapes and types instead of parameters."""
        return self._abstract

    def counted(self, params: Params | None = None) -> Counted:
        """Describes the model for `metrics.flops`, with other parameters if they are given."""
        unembeds = self.head in ("mlm", "clm")
        return Counted(params or self.abstract().params, self.config.windows, unembeds)

    @functools.cached_property
    def _abstract(self) -> Model:
        return family.abstract(self.family, self.config, self.head, self.policy)

    def frozen(self) -> Model:
        """Makes the model with shapes for parameters that no step trains: as `freeze` makes
        them."""
        return self._frozen

    @functools.cached_property
    def _frozen(self) -> Model:
        config, params = self.config, self.abstract().params
        if self.runs:
            config = dataclasses.replace(config, stacked=self.runs)
        graphdef = family.abstract(self.family, config, self.head, self.policy).graphdef
        return Model(jax.eval_shape(self.freeze, params), graphdef)

    def freeze(self, params: Params) -> Params:
        """Prepares parameters that no step trains: in operand types, padded as on the mesh, and
        with equal blocks stacked if these run as one loop."""
        params = self.padded(stored(params, self.policy))
        return family.stack_blocks(params, self.runs)

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """Lists the runs of equal blocks, or of patterns; () unless they run as one loop."""
        if not self.config.scan:
            return ()
        model = self.abstract()
        blocks = nnx.merge(model.graphdef, model.params).backbone.blocks
        return block_runs.repeats(blocks)

    def padded(self, params: Params) -> Params:
        """Pads tables over the vocabulary with rows of zeros, as on the mesh."""
        return family.with_rows(params, max(self.table_rows, self.config.vocab_size))

    def cut(self, params: Params) -> Params:
        """Removes the padding of tables over the vocabulary."""
        return family.with_rows(params, self.config.vocab_size)

    @functools.cached_property
    def of_members(self) -> nnx.GraphDef:
        """Returns the model's structure for `vmap` over parameters of several models: without
        cuDNN's attention, whose batching rule rejects a mask that heads share."""
        if self.policy.attention != "cudnn":
            return self.abstract().graphdef
        policy = dataclasses.replace(self.policy, attention="blocks")
        return family.abstract(self.family, self.config, self.head, policy).graphdef

    def changed(self, name: str, config: Any) -> Blueprint:
        """Describes a model of this family with another config, which no checkpoint has."""
        return dataclasses.replace(self, name=name, config=config, folder=None, commit=None)

    def load(self, key: Array | None) -> Params:
        """Opens the checkpoint's parameters, float32 lazy tensors; a missing head is drawn from
        `key`."""
        return hf.open(self.folder, self.family, self.config, self.head, key)

    def draw(self, key: Array) -> Params:
        """Draws random parameters; can run under jit."""
        return family.build(self.family, self.config, self.head, self.policy, key).params

    def with_drawn_head(self, key: Array) -> Model:
        """Makes the model with a random head, that of `draw`, and only shapes of the backbone."""
        model, kind = self.abstract(), self.family
        if not (head := model.params.get("head")):
            return model
        drawn = jax.jit(lambda key: family.draw(kind, self.config, {"head": head}, key))(key)
        return model.replace(params=model.params | drawn)


def describe(
    section: Any,
    key: str,
    head: str,
    policy: Policy,
    *,
    base: dict | None = None,
    vocab_size: int | None = None,
    labels: tuple[str, ...] | None = None,
    like: Any = None,
    execution: Mapping[str, Any] = MappingProxyType({}),
    offline: bool = False,
) -> Blueprint:
    """Describes the model of a section of the config.

    Args:
        section: the section; its keys are in kd_jax/sections.py.
        key: the section's name, for messages.
        head: mlm | clm | classification | span | embedding.
        policy: types to compute in.
        base: config.json that `architecture` changes if the section names no model.
        vocab_size: vocabulary size of the tokenizer that the run trains, if it trains one.
        labels: class names of a classification head; None takes those of the checkpoint.
        like: config of the model that `base` is of, whose embedding head a model without a
            checkpoint has.
        execution: how blocks run: remat, remat_keeps and scan of `ModelConfig`.
        offline: whether no weights are needed: well-known hub ids are taken from the built-in
            table, a model may be the path of a config.json, and one that is yet to be trained is as
            `architecture` describes it.

    Raises UserError for unknown ids, model types, keys and heads.
    """
    folder = commit = None
    if section.model:
        if offline and (given := Path(section.model).expanduser()).name == "config.json":
            base = hf.read_config(given.parent)
        elif offline and not given.is_dir():
            known = base is None or not section.architecture or section.model in PRESETS
            base = preset(section.model) if known else base
        else:
            named = key if key.startswith("--") else f"{key}.model"
            source = hub.resolve(section.model, section.revision or None, named)
            folder, commit = source.path, source.commit
            base = hf.read_config(folder)
    changes = dict(section.architecture)
    if base is None and "model_type" not in changes:
        raise UserError(f"{key}: set {key}.model, or {key}.architecture.model_type and its sizes")
    if vocab_size is not None:
        changes.setdefault("vocab_size", vocab_size)
    where = f"config.json of {section.model}" if section.model else "config.json of the teacher"
    if changes:  # the numbers that the user chose, over those of a whole checkpoint
        own = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        where = f"{key}.architecture ({own})" + (f" over the {where}" if base else "")
    kind, config = family.read(base or {}, where, changes)
    known = {*family.to_hf(kind, config), *family.SIZES, "model_type"}
    unknown = sorted(set(changes) - known)
    if unknown:
        have = ", ".join(sorted(known))
        raise UserError(f"{key}.architecture: unknown {', '.join(unknown)}; have: {have}")
    try:
        family.check_head(kind, head)
    except UserError as error:
        raise UserError(f"{section.model or key}: {error}; take another model or task") from None
    if labels is not None:
        config = dataclasses.replace(config, labels=labels)
        if len(labels) == 1:  # what it predicts is a score as it is, also to sentence-transformers
            stated = {"sentence_transformers": {"activation_fn": embedder.IDENTITY}}
            hf_json = json.dumps(json.loads(config.hf_json) | stated)
            config = dataclasses.replace(config, hf_json=hf_json)
    if head == "embedding":
        own = section.get("embedding"), f"{key}.embedding"
        config = embedder.configured(config, folder, None if section.model else like, *own)
    elif section.get("embedding"):
        raise UserError(f"config.{key}.embedding is for embedders, which this task does not train")
    config = dataclasses.replace(config, policy=policy, **execution)
    name = section.model or f"{kind.name} of {key}.architecture"
    return Blueprint(name, kind, config, head, policy, folder, commit)


def preset(model: str) -> dict:
    """Returns the config.json of a well-known hub id, with or without its organization ("gpt2").

    It has the keys that define the architecture; weights still come from the hub. Raises UserError
    with similar ids if there is no preset.
    """
    short = {name.rpartition("/")[2]: name for name in PRESETS}
    name = model if model in PRESETS else short.get(model)
    if name is None:
        close = difflib.get_close_matches(model, [*PRESETS, *short], n=3, cutoff=0.0)
        raise UserError(
            f"no built-in shape for {model!r}; give the path of its config.json, or one of "
            f"{len(PRESETS)} known ids, nearest: {', '.join(close)}"
        )
    return dict(PRESETS[name])


def stored(params: Params, policy: Policy) -> Params:
    """Casts parameters that are not trained: matrices to the operand type, vectors to float32."""
    operand = jnp.dtype(policy.operand)
    return jax.tree.map(lambda x: x.astype(operand if x.ndim > 1 else jnp.float32), params)


def count(params: Params) -> int:
    """Counts parameters; they may be abstract."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def size_mb(params: Params) -> float:
    """Computes the megabytes of parameters in an export (float32)."""
    return round(sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6, 2)
