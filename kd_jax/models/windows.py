"""Reads and writes which layers have a sliding window (Beltagy et al. 2020, arXiv:2004.05150), in
which a token sees only so many tokens, its own included, and rotary embeddings that differ there.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

from kd_jax.errors import UserError
from kd_jax.models import rotary
from kd_jax.models.config_json import Fields
from kd_jax.models.model_config import DecoderConfig, ModelConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def size(fields: Fields, default: int | None) -> int | None:
    """Reads sliding_window, None if there is none. Raises UserError unless it is 1 at least."""
    window = fields.get("sliding_window", int | None, default)
    if window is not None and window < 1:
        raise UserError(f"{fields.where}: sliding_window is {window}, want 1 at least, or null")
    return window


def layers(
    fields: Fields, count: int, window: int | None, slides: Callable[[int], bool]
) -> dict[str, object]:
    """Reads layer_types of `count` layers: the fields window and windowed of a ModelConfig.

    Without the key, a layer has a window where `slides` says so. Of a longer list, such as that of
    a larger model, the first entries count. Raises UserError for other kinds of layers, for too
    few, and for layers with a window of unknown size.
    """
    kinds = fields.get("layer_types", list | tuple | None, None)
    if kinds is None:
        kinds = [SLIDING if slides(layer) else FULL for layer in range(count)]
    unknown = sorted({str(kind) for kind in kinds} - {SLIDING, FULL})
    if unknown or len(kinds) < count:
        found = ", ".join(unknown) if unknown else f"{len(kinds)} entries for {count} layers"
        raise UserError(
            f"{fields.where}: layer_types has {found}; want {SLIDING} or {FULL} of each"
        )
    windowed = tuple(kind == SLIDING for kind in kinds[:count])
    if any(windowed) and window is None:
        raise UserError(
            f"{fields.where}: layer_types has {SLIDING}, but there is no window: set sliding_window"
            + (", and use_sliding_window to true" if "use_sliding_window" in fields.json else "")
        )
    return {"window": window, "windowed": windowed if any(windowed) else ()}


def switched(fields: Fields, count: int, default: int | None, slides: Callable) -> dict:
    """Reads the layers of a family that switches windows on by use_sliding_window."""
    window, on = size(fields, default), fields.get("use_sliding_window", bool, False)
    window = window if on else None
    return layers(fields, count, window, lambda layer: window is not None and slides(layer))


def layer_types(config: ModelConfig) -> dict[str, Sequence]:
    """Writes layer_types."""
    return {"layer_types": [FULL if window is None else SLIDING for window in config.windows]}


def write_switched(config: DecoderConfig) -> dict[str, object]:
    """Writes the keys that `switched` reads."""
    own = {} if config.window is None else {"sliding_window": config.window}
    return layer_types(config) | own | {"use_sliding_window": config.window is not None}


def read_rotaries(
    fields: Fields,
    max_positions: int,
    thetas: Mapping[str, tuple[str, float]],
    scaled: Collection[str] = (FULL, SLIDING),
) -> dict[str, rotary.Rotary]:
    """Reads the rotary embeddings of layers without a window and with one, from rope_parameters of
    each kind (transformers 5) or keys of their own (4).

    Args:
        fields: the keys.
        max_positions: the model's number of positions.
        thetas: the key of each kind's theta, and its default.
        scaled: the kinds that rope_scaling is for.
    """
    parts, found = fields.part("rope_parameters"), {}
    if unknown := sorted(parts.json.keys() - {FULL, SLIDING}):
        raise UserError(f"{parts.where} has {', '.join(unknown)}; have: {FULL}, {SLIDING}")
    for name, kind in (("rotary", FULL), ("local_rotary", SLIDING)):
        key, theta = thetas[kind]
        own = {"rope_parameters": parts.get(kind, dict | None, None)}
        if key in fields.json:
            own["rope_theta"] = fields.get(key, float, theta)
        if kind in scaled:
            own["rope_scaling"] = fields.get("rope_scaling", dict | None, None)
        found[name] = rotary.read(Fields(own, fields.where), max_positions, theta=theta)
    return found


def write_rotaries(config: ModelConfig, thetas: Mapping[str, tuple[str, float]]) -> dict:
    """Writes the keys that `read_rotaries` reads, but rope_scaling."""
    each = dict(zip((FULL, SLIDING), (one.to_hf() for one in config.rotaries), strict=True))
    own = {thetas[kind][0]: keys["rope_theta"] for kind, keys in each.items()}
    return own | {"rope_parameters": {kind: one["rope_parameters"] for kind, one in each.items()}}
