"""Loads a model to evaluate: a checkpoint, or the trained model of a finished run's stage."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import blueprint
from kd_jax.models.blueprint import Blueprint, count, size_mb
from kd_jax.precision import policy_for
from kd_jax.run import workdir
from kd_jax.run.models import check_vocabulary
from kd_jax.run.run import Run
from kd_jax.run.stage import restore_best
from kd_jax.run.teaching import given_params, laid_out
from kd_jax.teachers.store import identity
from kd_jax.train import sharding
from kd_jax.types import Model, Params

Report = dict[str, Any]
ROWS = 32  # of a batch, where nobody says otherwise: on a CPU as fast as 64, in less memory


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to evaluate, with its parameters, its tokenizer and the head of its report."""

    described: Blueprint
    load: Callable[[], Params]
    tokenizer: Any
    stated: Report  # "model", "precision", and "commit" or "stage"
    began: float  # time.perf_counter()

    @functools.cached_property
    def params(self) -> Params:
        """Reads the parameters, to the host or sharded as for training; only when first used, so
        that other mistakes are found before."""
        return self.load()

    @functools.cached_property
    def digest(self) -> str:
        """Names what the model computes: a hash of its parameters, architecture and types."""
        return identity(self.params, self.described.about)

    @functools.cached_property
    def frozen(self) -> tuple[Model, Mesh]:
        """Puts the model on all devices, its parameters in the types of products, as a teacher's
        are; only when first used, and then kept."""
        mesh = sharding.make_mesh()
        return self.model(mesh, frozen=True), mesh

    def model(self, mesh: Mesh, frozen: bool = False) -> Model:
        """Returns the model with its parameters on every device; `frozen`: cast to operand types,
        like a teacher."""
        policy = self.described.policy
        kept = blueprint.stored(self.params, policy) if frozen else self.params
        return laid_out(Model(kept, self.described.abstract().graphdef), mesh)

    def report(self, found: Report) -> Report:
        """Makes a report: the model's description, the metrics `found`, its size, the machine and
        the time taken."""
        return {
            **self.stated,
            **found,
            "parameters": count(self.params),
            "size_mb": size_mb(self.params),
            "machine": workdir.machine(),
            "seconds": round(time.perf_counter() - self.began, 2),
        }


def of_checkpoint(
    model: str, revision: str | None, head: str, precision: str | None, flag: str = "--model"
) -> Subject:
    """Opens the HF checkpoint of a folder or hub id with its tokenizer, by default in fp32; `flag`
    names it in messages."""
    began, precision = time.perf_counter(), precision or "fp32"
    policy = policy_for(precision, jax.default_backend())
    section = ConfigDict({"model": model, "revision": revision or "", "architecture": {}})
    described = blueprint.describe(section, flag, head, policy)
    tokenizer = tokenizers.load_tokenizer(described.folder)
    check_vocabulary(flag.lstrip("-"), described, tokenizer)
    stated = {"model": described.name, "commit": described.commit, "precision": precision}
    return Subject(described, lambda: described.load(None), tokenizer, stated, began)


def of_run(run: Run, name: str) -> Subject:
    """Opens the best checkpoint of a run's stage, or a teacher that no stage trained."""
    began = time.perf_counter()
    stage = run.stage(name)
    model = name if stage is None else stage.model
    described = run.models[model]
    stated = {"model": str(run.folder), "commit": described.commit, "stage": name}
    stated["precision"] = run.config.precision

    def load() -> Params:
        return given_params(run, name) if stage is None else restore_best(run, stage)

    return Subject(described, load, run.tokenizers[model], stated, began)


def for_these_devices(config: Mapping, batch_size: int, precision: str | None) -> ConfigDict:
    """Changes a finished run's config so that it fits any number of devices: only training
    settings, with batches of `batch_size` rows."""
    found = ConfigDict(config, type_safe=False)
    found.precision = precision or found.precision
    found.mesh.fsdp = found.accumulate = 1
    found.batch_size = found.eval.batch_size = rows(batch_size)
    for changes in found.stages.values():
        changes.batch_size = batch_size
    return found


def rows(given: int | None) -> int:
    """Chooses the rows of a batch: `given`, or about ROWS, a multiple of the devices. Raises
    UserError if the devices do not divide `given`."""
    devices = jax.device_count()
    found = -(-ROWS // devices) * devices if given is None else given
    if found < 1 or found % devices:
        raise UserError(
            f"--batch_size={found} cannot be divided among {devices} devices; make it a "
            f"multiple of {devices}"
        )
    return found


def rows_for(texts: int, rows: int) -> int:
    """Chooses the rows of a batch that is to hold `texts` texts, at most `rows`: of few texts 1, 4
    or 16 on each device, so that calls with few texts are fast and share compiled programs."""
    fewer = (each * jax.device_count() for each in (1, 4, 16))
    return next((few for few in fewer if texts <= few < rows), rows)
