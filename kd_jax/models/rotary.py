"""Computes rotary position embeddings (Su et al. 2021, arXiv:2104.09864), scaled for long rows.

A head's first 2 R features are rotated in pairs (i, i + R): pair i of a token at position p by the
angle p f_i, f_i = theta^(-i / R). For long rows f_i is scaled by one of the functions below, which
config.json names by `rope_type`, and whose keyword arguments are keys there. It computes f, (R,),
or (B, R) for rows of the lengths (B, 1), and a factor of cosine and sine.
"""

import dataclasses
import inspect
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from kd_jax.errors import UserError
from kd_jax.models.config_json import Fields
from kd_jax.types import Array

_ORIGINAL = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The settings of a model's rotary embedding."""

    theta: float
    max_positions: int = dataclasses.field(compare=False)  # the model's
    share: float = 1.0  # of a head's features that are rotated
    kind: str = "default"  # of SCALINGS
    settings: tuple[tuple[str, Any], ...] = ()  # keyword arguments of that

    @property
    def max_tokens(self) -> int:
        """Returns the length of the longest row that the model is made for."""
        reach = dict(self.settings)["factor"] if self.kind == "dynamic" else 1
        return int(self.max_positions * reach)

    @property
    def turning_point(self) -> int | None:
        """Returns the length of rows after which all their angles are others; None if there is no
        such length."""
        return dict(self.settings)[_ORIGINAL] if self.kind == "longrope" else None

    def plain(self, R: int) -> np.ndarray:
        """Computes the unscaled f_R for short rows, float64."""
        return self.theta ** (-np.arange(R) / R)

    def check(self, head_width: int) -> None:
        """Raises UserError if the rotated features of heads of this width do not form pairs."""
        rotated = int(head_width * self.share)
        least = 4 if self.kind == "dynamic" else 2
        if rotated % 2 or not least <= rotated <= head_width:
            raise UserError(
                f"rotary embedding: {rotated} of the {head_width} features of a head would be "
                f"rotated; want an even number from {least}: take heads of another width"
            )
        for name, value in self.settings:
            if isinstance(value, tuple) and len(value) != rotated // 2:
                raise UserError(
                    f"config.json: {name} has {len(value)} numbers for {rotated // 2} pairs of "
                    f"rotated features; {self.kind} fits heads of one width only"
                )

    def angles(self, head_width: int, positions_BT: Array, length_B1: Array) -> tuple[Array, Array]:
        """Computes cosine and sine for heads of this width, (B, T, R), float32.

        Some scalings depend on the length of a row, here without padding, so that neither padding
        nor other rows change the result. (HF uses the longest row's length with padding.)
        """
        pairs = int(head_width * self.share) // 2
        freq, size = SCALINGS[self.kind](self, pairs, length_B1, **dict(self.settings))
        freq = jnp.asarray(freq, jnp.float32)
        freq_BR = freq[None] if freq.ndim == 1 else freq
        angles_BTR = positions_BT.astype(jnp.float32)[:, :, None] * freq_BR[:, None]
        return jnp.cos(angles_BTR) * size, jnp.sin(angles_BTR) * size

    def to_hf(self) -> dict:
        """Writes the keys of config.json, for transformers 5 (rope_parameters) and 4."""
        keys: dict[str, Any] = {"rope_type": self.kind}
        required = [
            name for name, each in _settings(self.kind).items() if each.default is _REQUIRED
        ]
        for name, value in self.settings:
            if value is not None or name in required:
                keys[name] = list(value) if isinstance(value, tuple) else value
        own = {"rope_theta": self.theta}
        own |= {"partial_rotary_factor": self.share} if self.share != 1.0 else {}
        return {
            "rope_parameters": keys | own,
            "rope_scaling": keys if self.kind != "default" else None,
            **own,
        }


def rotate(x_BTHK: Array, angles: tuple[Array, Array]) -> Array:
    """Rotates the first 2 R features of every head by their token's angles."""
    cos, sin = (angle[:, :, None] for angle in angles)
    R = cos.shape[-1]
    x = x_BTHK[..., : 2 * R].astype(jnp.float32)
    one, two = x[..., :R], x[..., R:]
    turned = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BTHK.dtype), x_BTHK[..., 2 * R :]], axis=-1)


def _default(rotary: Rotary, R: int, length_B1: Array):
    return rotary.plain(R), 1.0


def _linear(rotary: Rotary, R: int, length_B1: Array, *, factor: float):
    """Divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595)."""
    return rotary.plain(R) / factor, 1.0


def _dynamic(rotary: Rotary, R: int, length_B1: Array, *, factor: float):
    """Scales by dynamic NTK: a larger theta for rows longer than max_position_embeddings, up to
    `factor` times that."""
    longest = rotary.max_positions
    seen_B1 = jnp.maximum(length_B1.astype(jnp.float32), longest)
    growth_B1 = factor * seen_B1 / longest - (factor - 1.0)
    theta_B1 = rotary.theta * growth_B1 ** (R / (R - 1.0))
    return theta_B1 ** (-jnp.arange(R, dtype=jnp.float32) / R)[None], 1.0


def _yarn(
    rotary: Rotary,
    R: int,
    length_B1: Array,
    *,
    original_max_position_embeddings: int,
    factor: float | None,  # None: by the two lengths
    attention_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool | None = None,
):
    """Scales by YaRN (Peng et al. 2023, arXiv:2309.00071): slow pairs are stretched, fast ones are
    not, those between `beta_slow` and `beta_fast` turns in the original length are interpolated."""
    original = original_max_position_embeddings
    factor = factor or rotary.max_positions / original

    def pair(turns: float) -> float:
        """Computes the (fractional) pair that makes this many turns in the original length."""
        return R * math.log(original / (turns * 2 * math.pi)) / math.log(rotary.theta)

    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    low, high = pair(beta_fast or 32.0), pair(beta_slow or 1.0)
    if truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * R - 1)
    high = high if high > low else low + 1e-3
    stretched = np.clip((np.arange(R) - low) / (high - low), 0.0, 1.0)
    freq = rotary.plain(R) * (1 - stretched) + rotary.plain(R) / factor * stretched
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = growth(mscale) / growth(mscale_all_dim)
    return freq, growth(1.0) if attention_factor is None else attention_factor


def _longrope(
    rotary: Rotary,
    R: int,
    length_B1: Array,
    *,
    original_max_position_embeddings: int,
    short_factor: tuple,
    long_factor: tuple,
    factor: float | None = None,  # None: by the two lengths
    attention_factor: float | None = None,
):
    """Scales by LongRoPE (Ding et al. 2024, arXiv:2402.13753): a stretch for each pair, another one
    for rows longer than the original length."""
    original = original_max_position_embeddings
    factor = factor or rotary.max_positions / original
    short, long = (
        jnp.asarray(rotary.plain(R) / np.array(stretch), jnp.float32)
        for stretch in (short_factor, long_factor)
    )
    if attention_factor is None:
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        attention_factor = grown
    return jnp.where(length_B1 > original, long[None], short[None]), attention_factor


def _llama3(
    rotary: Rotary,
    R: int,
    length_B1: Array,
    *,
    original_max_position_embeddings: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
):
    """Scales like Llama 3.1 (Dubey et al. 2024, arXiv:2407.21783): pairs with fewer turns in the
    original length than `low_freq_factor` are stretched, those over `high_freq_factor` are not."""
    plain = rotary.plain(R)
    turns = original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return plain * kept + plain / factor * (1 - kept), 1.0


# By the names that config.json has.
SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
_REQUIRED = inspect.Parameter.empty
_ELSEWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _settings(kind: str) -> dict[str, inspect.Parameter]:
    """Lists the keys of config.json that a scaling function reads."""
    every = inspect.signature(SCALINGS[kind]).parameters
    return {name: each for name, each in every.items() if each.kind is each.KEYWORD_ONLY}


def read(
    fields: Fields, max_positions: int, share: float | None = None, theta: float = 10_000.0
) -> Rotary:
    """Reads the rotary embedding of a config.json.

    Args:
        fields: its keys.
        max_positions: the model's number of positions.
        share: the default of partial_rotary_factor; None if the family always rotates whole heads.
        theta: the default of rope_theta.

    Raises UserError for an unknown scaling, missing keys, and contradictory keys.
    """
    keys = [
        key for key in ("rope_scaling", "rope_parameters") if fields.get(key, dict | None, None)
    ]
    parts = [fields.part(key) for key in keys or [None]]
    found = {_read(fields, own, max_positions, share, theta) for own in parts}
    if len(found) > 1:
        raise UserError("config.json: rope_scaling and rope_parameters differ; keep one of them")
    return found.pop()


def _read(
    fields: Fields, own: Fields, max_positions: int, share: float | None, theta: float
) -> Rotary:
    """Reads the settings from the nested keys `own`, or else from `fields`."""
    kind = own.get("rope_type", str, own.get("type", str, "default"))
    if kind not in SCALINGS:
        have = ", ".join(SCALINGS)
        raise UserError(f"{own.where}: rope_type={kind!r} is not supported; have: {have}")
    known = _settings(kind)
    unknown = sorted(own.json.keys() - known.keys() - set(_ELSEWHERE))
    if unknown:
        raise UserError(
            f"{own.where}: rope_type={kind!r} knows no {', '.join(unknown)}; "
            f"have: {', '.join([*known, *_ELSEWHERE])}"
        )
    values = {name: _setting(each, fields, own, max_positions) for name, each in known.items()}
    settings = tuple(values.items())
    if share is None:
        for each in (fields, own):
            each.only("partial_rotary_factor", None, 1.0)
    values["rope_theta"] = theta = _agreed(fields, own, "rope_theta", theta)
    if share is not None:
        share = values["partial_rotary_factor"] = _agreed(
            fields, own, "partial_rotary_factor", share
        )
    for key, value in values.items():
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(isinstance(x, int | float) and (x is False or x > 0) for x in numbers):
            raise UserError(f"{own.where}: {key} is {value}, want numbers above 0")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UserError(
            f"config.json: high_freq_factor is {values['high_freq_factor']}, want more than the "
            f"low_freq_factor, {values['low_freq_factor']}"
        )
    return Rotary(theta, max_positions, 1.0 if share is None else share, kind, settings)


def _agreed(fields: Fields, own: Fields, key: str, default: float) -> float:
    """Reads a number from `own` or `fields`; UserError if both have it with different values."""
    outside = fields.get(key, float | None, None)
    inside = own.get(key, float | None, None)
    if inside is not None and outside is not None and inside != outside:
        raise UserError(f"config.json: {key} is {outside}, but {inside} in {own.where}; keep one")
    return next((x for x in (inside, outside) if x is not None), default)


def _setting(each: inspect.Parameter, fields: Fields, own: Fields, max_positions: int) -> Any:
    """Reads one setting of a scaling function."""
    if each.name == _ORIGINAL:  # the model's own key goes first, as in HF
        inside = own.get(each.name, int, max_positions)
        return fields.get(each.name, int, inside)
    if each.default is _REQUIRED and each.name not in own.json:
        raise UserError(f"{own.where}: {each.name} is missing")
    if each.annotation is tuple:
        return tuple(own.get(each.name, list, []))
    return own.get(each.name, each.annotation, None)
