"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), and their stretches to long rows.

A head's first `part` of features is rotated in pairs (i, i + R), R = half of what is rotated: pair
i of a token at position p by the angle p f_i, f_i = theta^(-i / R). A stretch changes f_i; its
class is named in config.json by `rope_type`, and its fields are the keys that it reads there.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from kd_jax.errors import UserError
from kd_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Default:
    """No stretch."""

    def frequencies(self, rotary: "Rotary", R: int, length_B1: Array) -> tuple[Any, float]:
        """Computes f, (R,) or (B, R), for rows of those lengths; and a factor of cosine and
        sine."""
        return rotary.plain(R), 1.0

    def check(self, R: int) -> None:
        """Raises UserError where so many pairs cannot be stretched."""


@dataclasses.dataclass(frozen=True)
class Linear(Default):
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def frequencies(self, rotary, R, length_B1):
        return rotary.plain(R) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Dynamic(Default):
    """Dynamic NTK: a larger theta for rows longer than max_position_embeddings, up to `factor`
    times that."""

    factor: float

    def frequencies(self, rotary, R, length_B1):
        longest = rotary.max_positions
        seen_B1 = jnp.maximum(length_B1.astype(jnp.float32), longest)
        growth_B1 = self.factor * seen_B1 / longest - (self.factor - 1.0)
        theta_B1 = rotary.theta * growth_B1 ** (R / (R - 1.0))
        return theta_B1 ** (-jnp.arange(R, dtype=jnp.float32) / R)[None], 1.0


@dataclasses.dataclass(frozen=True)
class Yarn(Default):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): slow pairs are stretched, fast ones are not, those
    between `beta_slow` and `beta_fast` turns in the original length in part."""

    original_max_position_embeddings: int
    factor: float | None  # None: by the two lengths
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def frequencies(self, rotary, R, length_B1):
        original = self.original_max_position_embeddings
        factor = self.factor or rotary.max_positions / original

        def pair(turns: float) -> float:
            """The pair that turns so often in the original length."""
            return R * math.log(original / (turns * 2 * math.pi)) / math.log(rotary.theta)

        low, high = pair(self.beta_fast or 32.0), pair(self.beta_slow or 1.0)
        if self.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * R - 1)
        high = high if high > low else low + 1e-3
        stretched = np.clip((np.arange(R) - low) / (high - low), 0.0, 1.0)
        plain = rotary.plain(R)
        return plain * (1 - stretched) + plain / factor * stretched, self._size(factor)

    def _size(self, factor: float) -> float:
        def growth(scale: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)


@dataclasses.dataclass(frozen=True)
class LongRope(Default):
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a stretch for each pair, another one for rows
    longer than the original length."""

    original_max_position_embeddings: int
    short_factor: tuple
    long_factor: tuple
    factor: float | None = None  # None: by the two lengths
    attention_factor: float | None = None

    def frequencies(self, rotary, R, length_B1):
        original = self.original_max_position_embeddings
        short, long = (
            jnp.asarray(rotary.plain(R) / np.array(stretch), jnp.float32)
            for stretch in (self.short_factor, self.long_factor)
        )
        size, factor = self.attention_factor, self.factor or rotary.max_positions / original
        if size is None:
            size = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return jnp.where(length_B1 > original, long[None], short[None]), size

    def check(self, R):
        for name in ("short_factor", "long_factor"):
            found = len(getattr(self, name))
            if found != R:
                raise UserError(
                    f"config.json: {name} has {found} numbers for {R} pairs of rotated features; "
                    f"longrope fits heads of one width only"
                )


@dataclasses.dataclass(frozen=True)
class Llama3(Default):
    """Llama 3.1 (Dubey et al. 2024, arXiv:2407.21783): pairs slower than `low_freq_factor` turns in
    the original length are stretched, those faster than `high_freq_factor` are not."""

    original_max_position_embeddings: int
    factor: float
    low_freq_factor: float
    high_freq_factor: float

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"config.json: high_freq_factor is {self.high_freq_factor}, want more than the "
                f"low_freq_factor, {self.low_freq_factor}"
            )

    def frequencies(self, rotary, R, length_B1):
        plain = rotary.plain(R)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return plain * kept + plain / self.factor * (1 - kept), 1.0


# By the names that config.json has.
SCALINGS = {
    "default": Default,
    "linear": Linear,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "longrope": LongRope,
    "llama3": Llama3,
}
_ELSEWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Settings of a model's rotary embedding."""

    theta: float
    max_positions: int = dataclasses.field(compare=False)  # the model's
    part: float = 1.0  # of a head's features
    scaling: Default = Default()

    @property
    def max_tokens(self) -> int:
        """The longest row that the model is made for."""
        if isinstance(self.scaling, Dynamic):
            return int(self.max_positions * self.scaling.factor)
        return self.max_positions

    def plain(self, R: int) -> np.ndarray:
        """Computes f_R without a stretch, float64."""
        return self.theta ** (-np.arange(R) / R)

    def pairs(self, head_width: int) -> int:
        """Counts the rotated pairs, R, of a head of that width."""
        return int(head_width * self.part) // 2

    def check(self, head_width: int) -> None:
        """Raises UserError where the features of heads of that width make no pairs."""
        rotated = int(head_width * self.part)
        least = 4 if isinstance(self.scaling, Dynamic) else 2
        if rotated % 2 or not least <= rotated <= head_width:
            raise UserError(
                f"rotary embedding: {rotated} of the {head_width} features of a head would be "
                f"rotated; want an even number from {least}: take heads of another width"
            )
        self.scaling.check(rotated // 2)

    def angles(self, head_width: int, positions_BT: Array, length_B1: Array) -> tuple[Array, Array]:
        """Computes cosine and sine for heads of that width, (B, T, R), float32.

        Some stretches react to the length of a row: its tokens without padding, so that neither
        padding nor other rows change it. (In HF it is that of the longest row with its padding.)
        """
        freq, size = self.scaling.frequencies(self, self.pairs(head_width), length_B1)
        freq = jnp.asarray(freq, jnp.float32)
        freq_BR = freq[None] if freq.ndim == 1 else freq
        angles_BTR = positions_BT.astype(jnp.float32)[:, :, None] * freq_BR[:, None]
        return jnp.cos(angles_BTR) * size, jnp.sin(angles_BTR) * size

    def to_hf(self) -> dict:
        """Writes the keys of config.json, for transformers 5 (rope_parameters) and 4."""
        kind = next(name for name, cls in SCALINGS.items() if type(self.scaling) is cls)
        keys = {"rope_type": kind}
        for field in dataclasses.fields(self.scaling):
            value = getattr(self.scaling, field.name)
            if value is not None or field.default is dataclasses.MISSING:
                keys[field.name] = list(value) if isinstance(value, tuple) else value
        own = {"rope_theta": self.theta}
        own |= {"partial_rotary_factor": self.part} if self.part != 1.0 else {}
        return {
            "rope_parameters": keys | own,
            "rope_scaling": keys if kind != "default" else None,
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


def read(fields: Any, max_positions: int, part: float | None = None) -> Rotary:
    """Reads the rotary embedding of a config.json.

    Args:
        fields: `family.Fields` of it.
        max_positions: of the model.
        part: the default of partial_rotary_factor; None where the family rotates whole heads.

    Raises UserError on a stretch that is unknown or lacks something, and on keys that contradict.
    """
    found = {
        key: _read(fields, fields.part(key), max_positions, part)
        for key in ("rope_scaling", "rope_parameters")
        if fields.get(key, dict | None, None)
    }
    if not found:
        return _read(fields, fields.part(None), max_positions, part)
    if len(set(found.values())) > 1:
        raise UserError("config.json: rope_scaling and rope_parameters differ; keep one of them")
    return next(iter(found.values()))


def _read(fields: Any, own: Any, max_positions: int, part: float | None) -> Rotary:
    """What the keys `own` say, and `fields` where they do not."""
    name = own.get("rope_type", str, own.get("type", str, "default"))
    if name not in SCALINGS:
        raise UserError(f"{own.where}: rope_type={name!r} is not supported; have: {_have()}")
    names = {field.name: field for field in dataclasses.fields(SCALINGS[name])}
    unknown = sorted(own.json.keys() - names.keys() - set(_ELSEWHERE))
    if unknown:
        raise UserError(
            f"{own.where}: rope_type={name!r} knows no {', '.join(unknown)}; "
            f"have: {', '.join([*names, *_ELSEWHERE])}"
        )
    values = {key: _value(field, fields, own, max_positions) for key, field in names.items()}
    if part is None:
        for each in (fields, own):
            each.only("partial_rotary_factor", None, 1.0)
    rotary = Rotary(
        theta=_agreed(fields, own, "rope_theta", 10_000.0),
        max_positions=max_positions,
        part=1.0 if part is None else _agreed(fields, own, "partial_rotary_factor", part),
        scaling=SCALINGS[name](**values),
    )
    numbers = {"rope_theta": rotary.theta, "partial_rotary_factor": rotary.part, **values}
    for key, value in numbers.items():
        if isinstance(value, tuple):
            bad = not all(isinstance(x, int | float) and x > 0 for x in value)
        else:
            bad = isinstance(value, int | float) and not isinstance(value, bool) and value <= 0
        if bad:
            raise UserError(f"{own.where}: {key} is {value}, want numbers above 0")
    return rotary


def _have() -> str:
    return ", ".join(SCALINGS)


def _agreed(fields: Any, own: Any, key: str, default: float) -> float:
    """A number that may stand at either place, or at both if it is the same."""
    outside = fields.get(key, float | None, None)
    inside = own.get(key, float | None, None)
    if inside is not None and outside is not None and inside != outside:
        raise UserError(f"config.json: {key} is {outside}, but {inside} in {own.where}; keep one")
    return next((x for x in (inside, outside) if x is not None), default)


def _value(field: dataclasses.Field, fields: Any, own: Any, max_positions: int) -> Any:
    """One field of a stretch."""
    if field.name == "original_max_position_embeddings":  # the model's own key goes first, as in HF
        inside = own.get(field.name, int, max_positions)
        return fields.get(field.name, int, inside)
    if field.default is dataclasses.MISSING and field.name not in own.json:
        raise UserError(f"{own.where}: {field.name} is missing")
    if field.type is tuple:
        return tuple(own.get(field.name, list, []))
    return own.get(field.name, field.type, None)
