"""The config.json of well-known hub ids (presets.json), so that planning needs no network.

`find` gives the keys that fix an architecture; weights still come from the hub. Sizes are those of
the published checkpoints. Among them are the small BERTs of Turc et al. (2019, arXiv:1908.08962),
and stories260K of karpathy/tinyllamas, which is no HF checkpoint.
"""

import difflib
import json
from pathlib import Path

from kd_jax.errors import UserError

PRESETS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def find(model: str) -> dict:
    """Returns the config.json of a hub id, with or without its organisation ("gpt2").

    Raises UserError with the nearest ids where there is no preset.
    """
    short = {name.rpartition("/")[2]: name for name in PRESETS}
    name = model if model in PRESETS else short.get(model)
    if name is None:
        close = difflib.get_close_matches(model, [*PRESETS, *short], n=3, cutoff=0.0)
        raise UserError(
            f"no built-in shape for {model!r}; give a local folder with its config.json, or one of "
            f"{len(PRESETS)} known ids, nearest: {', '.join(close)}"
        )
    return dict(PRESETS[name])
