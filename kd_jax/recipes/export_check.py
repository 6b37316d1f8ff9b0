"""Compares a written checkpoint with the model in memory: logits, and text that PyTorch writes."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.models import embedder, family, hf, weight_files
from kd_jax.models.blueprint import Blueprint, count
from kd_jax.precision import Policy
from kd_jax.report import card
from kd_jax.train import sharding
from kd_jax.types import Batch, Params

log = logging.getLogger(__name__)

# Of a difference, relative to the largest logit where that is above 1; of vectors, always
# relative to the largest number.
TOLERANCE = 1e-4
NEW_TOKENS = 4  # that PyTorch writes
COMPARED = 4_000_000_000  # parameters of the largest model of which PyTorch computes logits

_BARE = ("none", "embedding")  # heads whose class in PyTorch is the base model's

Logits = Callable[[Batch], np.ndarray]  # float32, as `logits_of` gives them


def check(folder: Path | None, blueprint: Blueprint, params: Params) -> dict[str, float]:
    """Compares the files with `params`, tensor by tensor, and PyTorch's logits with kd_jax's.

    All processes call this together; `folder` is None in all but the first one. Returns the largest
    |difference| of a logit by loader; raises RuntimeError if one is too large, or tensors differ.
    """
    if folder is None:
        for leaf in jax.tree.leaves(params):
            sharding.take_part(leaf)
        return {}
    kind, config = family.read(hf.read_config(folder))
    config = embedder.read(config, folder) if blueprint.head == "embedding" else config
    again = hf.open(folder, kind, config, blueprint.head)
    flat = family.flatten(again)
    for path, leaf in family.flatten(params).items():
        if not np.array_equal(flat[path].read(), sharding.whole(leaf)):
            raise RuntimeError(f"{folder}: loaded again, {path} differs from the model's")
    if count(params) > COMPARED:
        log.warning("%s is too large for this host to compare PyTorch's logits as well", folder)
        return {"kd_jax": 0.0}
    again = jax.tree.map(np.asarray, again)
    own = Blueprint("", kind, config, blueprint.head, Policy())
    want = functools.partial(logits_of, own, again)
    found = check_in_pytorch(folder, blueprint.head, example_of(blueprint), want)
    return {"kd_jax": 0.0} | found


def check_in_pytorch(folder: Path, head: str, batch: Batch, want: Logits) -> dict[str, float]:
    """Computes the largest absolute difference of PyTorch's logits from `want`, ours; returns {}
    where PyTorch is not installed.

    A causal model also generates a few tokens with PyTorch's cache of keys and values; their logits
    are compared with kd_jax's for the whole text, so both choose the same tokens, but for ties.
    """
    if importlib.util.find_spec("torch") is None:
        return {}
    model, real = load_in_pytorch(folder, head), _real(head, batch)
    found = torch_logits(model, head, batch)
    if head == "embedding":
        found = _vectors(folder, found, batch.mask_BT)
    differences = [difference(folder, head, "pytorch", found[real], want(batch)[real])]
    if head == "clm":
        text, found = torch_writes(model, batch)
        end = int(text.mask_BT[0].sum()) - 1  # nothing follows the last token
        ours = want(text)[:, end - found.shape[1] : end]
        differences.append(difference(folder, head, "pytorch's text, with a cache,", found, ours))
    return {"pytorch": max(differences)}


def _real(head: str, batch: Batch) -> np.ndarray:
    """Masks the logits to compare: those of real tokens, or one row of logits for classes and
    vectors."""
    real = batch.mask_BT > 0
    return real[:, :1] if head in ("classification", "embedding") else real


def difference(folder: Path, head: str, name: str, found: np.ndarray, want: np.ndarray) -> float:
    """Finds the largest |difference| of a logit; RuntimeError if it is above the tolerance."""
    most, largest = (float(np.abs(x).max()) for x in (found - want, want))
    limit = TOLERANCE * (largest if head == "embedding" else max(1.0, largest))
    if not most <= limit:
        raise RuntimeError(f"{folder}: loaded again, logits differ: {name} by {most} (<= {limit})")
    return most


def example_of(blueprint: Blueprint) -> Batch:
    """Makes two rows of random tokens, the second padded."""
    config = blueprint.config
    pad = getattr(config, "pad_id", None)
    length = min(32, config.max_positions - 2)  # RoBERTa's positions begin at 2
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, config.vocab_size, (2, length), dtype=np.int32)
    if pad is not None:  # a padding token within the text would move RoBERTa's positions
        tokens_BT = np.where(tokens_BT == pad, (pad + 1) % config.vocab_size, tokens_BT)
    mask_BT = np.ones((2, length), np.float32)
    mask_BT[1, length // 2 :] = 0
    tokens_BT = np.where(mask_BT > 0, tokens_BT, pad or 0).astype(np.int32)
    return Batch(
        ids_B=np.arange(2, dtype=np.int32),
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        labels=np.zeros_like(tokens_BT),
        weights=np.zeros_like(mask_BT),
    )


def logits_of(blueprint: Blueprint, params: Params, batch: Batch) -> np.ndarray:
    """Computes float32 logits in full precision, (B, T, V), (B, 1, C) of classes, (B, T, 2) of
    spans; vectors (B, 1, D) of embedders; without a head, the hidden states (B, T, D)."""
    model = family.abstract(blueprint.family, blueprint.config, blueprint.head, Policy())
    full = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        output = _computed(model.replace(params=full), batch)
    if blueprint.head == "span":
        return np.asarray(output.logits.swapaxes(1, 2))
    return np.asarray(output.features if blueprint.head == "none" else output.logits)


_computed = jax.jit(lambda model, batch: model(batch))


def load_in_pytorch(folder: Path, head: str) -> Any:
    """Loads the model with transformers; RuntimeError if a tensor is left over or missing."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    loader = getattr(transformers, card.HEADS[head].auto)
    ours = "auto_map" in hf.read_config(folder)  # a class that this package put there
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=ours
    )
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if head not in _BARE and wrong:  # AutoModel adds BERT's pooler, which is not exported
        raise RuntimeError(f"{folder}: PyTorch does not take it as it is: {wrong}")
    return model.eval()


def torch_logits(model: Any, head: str, batch: Batch) -> np.ndarray:
    """Computes the same logits as `logits_of`, with a PyTorch model; of an embedder, the hidden
    states."""
    import torch

    with torch.inference_mode():
        output = model(
            input_ids=torch.from_numpy(batch.tokens_BT).long(),
            attention_mask=torch.from_numpy(batch.mask_BT).long(),
        )
    if head == "span":
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()
    if head == "classification":
        return output.logits[:, None].numpy()
    return (output.last_hidden_state if head in _BARE else output.logits).numpy()


def _vectors(folder: Path, hidden_BTD: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    import torch

    x_BD = torch_vectors(folder, torch.from_numpy(hidden_BTD), torch.from_numpy(mask_BT))
    return x_BD[:, None].numpy()


def torch_vectors(folder: Path, x: Any, mask_BT: Any) -> Any:
    """Computes an embedder's vectors (B, D) of hidden states (B, T, D) as sentence-transformers
    does with the files of a folder, which need not be installed; all are PyTorch's tensors."""
    import torch

    real = mask_BT[..., None] > 0
    for module in json.loads((folder / embedder.MODULES).read_text())[1:]:
        kind, place = module["type"].rpartition(".")[2], folder / module["path"]
        if kind == "Normalize":
            x = torch.nn.functional.normalize(x, dim=-1)
            continue
        stated = json.loads((place / "config.json").read_text())
        if kind == "Dense":
            tensors = weight_files.read(place).items()
            each = {name: torch.from_numpy(np.array(tensor.array)) for name, tensor in tensors}
            x = torch.nn.functional.linear(x, each["linear.weight"], each.get("linear.bias"))
            x = getattr(torch.nn, stated["activation_function"].rpartition(".")[2])()(x)
            continue
        chosen = next(key for key, value in stated.items() if key.startswith("pooling") and value)
        if chosen == "pooling_mode_max_tokens":
            x = x.masked_fill(~real, -torch.inf).amax(1)
        elif chosen == "pooling_mode_mean_tokens":
            x = (x * real).sum(1) / real.sum(1)
        elif chosen == "pooling_mode_cls_token":
            x = x[:, 0]
        else:
            last_B = real.sum((1, 2)) - 1
            x = x.gather(1, last_B[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
    page = json.loads((folder / "config_sentence_transformers.json").read_text())
    return x[:, : page.get("truncate_dim")]


def torch_writes(model: Any, batch: Batch) -> tuple[Batch, np.ndarray]:
    """Generates with PyTorch, using its cache, after the first halves of the rows: returns (the
    rows with the N new tokens, the float32 logits (B, N, V) that chose these)."""
    import torch
    import transformers

    start = batch.tokens_BT.shape[1] // 2
    prompt = torch.from_numpy(batch.tokens_BT[:, :start]).long()
    model.generation_config = transformers.GenerationConfig()  # not what a checkpoint prefers
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(NEW_TOKENS, batch.tokens_BT.shape[1] - start),
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    length = found.sequences.shape[1]
    tokens_BT, mask_BT = np.array(batch.tokens_BT), np.zeros_like(batch.mask_BT)
    tokens_BT[:, :length], mask_BT[:, :length] = found.sequences.numpy(), 1
    text = batch.replace(tokens_BT=tokens_BT, mask_BT=mask_BT)
    return text, torch.stack(found.logits, dim=1).float().numpy()
