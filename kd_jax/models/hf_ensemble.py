"""An ensemble as one Hugging Face folder: the members' tensors side by side, and a PyTorch model of
our own that averages them (pytorch/modeling_kd_jax_ensemble.py)."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.numpy

from kd_jax.models import hf
from kd_jax.models.family import Family
from kd_jax.types import Params

MODELING_FILE = Path(__file__).with_name("pytorch") / "modeling_kd_jax_ensemble.py"
MODEL_TYPE = "kd_jax_ensemble"
_AUTO_MAP = {
    auto: f"{MODELING_FILE.stem}.{name}"
    for auto, name in {
        "AutoConfig": "KDJaxEnsembleConfig",
        "AutoModelForCausalLM": "KDJaxEnsembleForCausalLM",
    }.items()
}


def save(
    folder: Path,
    members: Sequence[Params],
    weights: Sequence[float],
    space: str,
    family: Family,
    config: Any,
) -> None:
    """Writes config.json, model.safetensors and the modelling file to `folder`.

    Args:
        members: parameters of decoders of one shape, with their language-modelling heads.
        weights: of the mean, one a member.
        space: logits | probabilities, in which it is taken.
        family, config: of every member.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    for number, params in enumerate(members):
        with tempfile.TemporaryDirectory(dir=folder) as part:
            hf.save(Path(part), params, family, config, "clm")
            member = hf.read_config(Path(part))
            own = safetensors.numpy.load_file(Path(part) / "model.safetensors")
        tensors |= {f"members.{number}.{name}": tensor for name, tensor in own.items()}
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    page = {name: member[name] for name in kept if name in member}
    page |= {
        "model_type": MODEL_TYPE,
        "architectures": ["KDJaxEnsembleForCausalLM"],
        "auto_map": _AUTO_MAP,
        "member": member,
        "weights": [float(weight) for weight in weights],
        "space": space,
    }
    (folder / "config.json").write_text(json.dumps(page, indent=2, sort_keys=True) + "\n")
    shutil.copy(MODELING_FILE, folder)
    file = folder / "model.safetensors"
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors gives it to its owner alone
