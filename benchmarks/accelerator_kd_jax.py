"""One kd_jax process of accelerator.py: times some work and prints one line of JSON.

The step is the one of a run (kd_jax/run), with random parameters that are drawn on the device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_cases import TEMPERATURE, TINY, Work, arguments, time_and_print, work_of
from ml_collections import ConfigDict
from timing import resident

from kd_jax import config
from kd_jax.cli import start_jax
from kd_jax.metrics import flops
from kd_jax.models import generate
from kd_jax.models.blueprint import stored
from kd_jax.objectives import ce, kl, vocab
from kd_jax.objectives.logits import Head
from kd_jax.plans import topology
from kd_jax.recipes import plan
from kd_jax.run import stage
from kd_jax.run.run import Run, build
from kd_jax.train import loop, sharding, step
from kd_jax.types import Batch

PEAKS = {"H100": "h100:1", "H200": "h200:1", "v5 lite": "v5e:1x1", "v6 lite": "v6e:1x1"}
PEAKS |= {"v5p": "v5p:2x2x1", "TPU v5": "v5p:2x2x1"}


def peak_flops() -> float | None:
    """The bf16 peak of this device; None if it is unknown."""
    kind = jax.devices()[0].device_kind
    found = next((name for part, name in PEAKS.items() if part in kind), None)
    return found and topology.find(found).peak_flops


def config_of(work: Work, tiny: bool) -> ConfigDict:
    """The config of a run of this work; its data are never read."""
    c = config.base("pretrain")
    c.task = dict(name=work.head, seq_len=work.tokens)
    c.data = dict(train=dict(source="files", path="none.txt"), held_out=0.1)
    c.teacher.model, c.student.model, c.student.init = work.teacher, work.student, "scratch"
    c.student.architecture = {} if work.student else dict(num_hidden_layers=work.layers)
    if tiny:
        family = "qwen2" if work.student else work.head.replace("mlm", "bert")
        family = family.replace("clm", "gpt2")
        c.teacher.model, c.teacher.init, c.student.model = "", "scratch", ""
        c.teacher.architecture = dict(model_type=family, **TINY)
        if family == "qwen2":
            c.teacher.architecture.update(num_key_value_heads=1)
        c.student.architecture = dict(num_hidden_layers=1)
    c.objective = dict(ce=dict(weight=1.0), kl=dict(weight=1.0, temperature=TEMPERATURE))
    c.batch_size, c.stages = work.rows, dict(student=dict())
    c.eval.batch_size = work.rows
    return c


def batch_of(shapes: Batch, vocab_size: int) -> Batch:
    """A batch of random tokens without padding, of the shapes that the task states."""
    random = np.random.default_rng(0)

    def filled(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = sharding.path_name(path)
        if "tokens" in name or "labels" in name:
            return random.integers(0, vocab_size, leaf.shape, dtype=np.int32)
        if "positions" in name:
            return np.broadcast_to(np.arange(leaf.shape[1], dtype=np.int32), leaf.shape).copy()
        if "segments" in name or "types" in name:
            return np.zeros(leaf.shape, np.int32)
        return np.ones(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(filled, shapes)


def step_of(run: Run) -> tuple[Callable[[], Any], int]:
    """A train step of a run, and the FLOPs that it needs."""
    this = run.principal
    key = jax.random.key(0)
    teacher = run.models["teacher"]
    drawn = jax.jit(lambda key: teacher.freeze(teacher.draw(key)))(key)
    teacher = teacher.frozen().replace(params=drawn)
    state = stage.create_state(run, this, {"teacher": drawn})
    shapes = run.task.shapes(this.batch_size)
    sizes = [run.models[name].config.vocab_size for name in ("teacher", "student")]
    batch = sharding.place(batch_of(shapes, min(sizes)), run.mesh)
    schedules: loop.Schedules = this.schedules

    def once() -> float:
        nonlocal state
        inputs = sharding.everywhere(schedules.at(0), run.mesh)
        state, metrics = step.train_step(state, batch, teacher, inputs, program=this.program)
        return float(metrics["loss"])

    return once, plan.needed(run)["flops_needed"]


def loss_of(run: Run, rows: int) -> tuple[Callable[[], Any], int]:
    """The vocabulary loss and its gradients, and the FLOPs that they need: two products of the
    teacher's and student's logits, two of gradients."""
    engine = vocab.Engine(
        (vocab.RowTerm("ce", ce.make()), vocab.RowTerm("kl", kl.make(), TEMPERATURE)),
        run.policy,
        run.policy,
    )
    models = [run.models[name].config for name in ("teacher", "student")]
    size = min(model.vocab_size for model in models)
    keys = jax.random.split(jax.random.key(0), 4)

    def drawn(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, run.policy.operand)

    teacher = Head(
        drawn(keys[0], rows, models[0].width), drawn(keys[1], size, models[0].width), None
    )
    own = drawn(keys[2], rows, models[1].width), drawn(keys[3], size, models[1].width)
    labels_N, ones_N = jnp.zeros(rows, jnp.int32), jnp.ones(rows)
    weights, scales = dict(ce=ones_N, kl=ones_N), dict(ce=jnp.float32(1), kl=jnp.float32(1))

    @jax.jit
    def both(own: tuple, teacher: Head) -> Any:
        def loss(own: tuple) -> Any:
            head = Head(*own, None)
            return vocab.vocab_loss(engine, head, teacher, labels_N, weights, scales, {})

        return jax.value_and_grad(loss, has_aux=True)(own)

    widths = models[0].width + 3 * models[1].width
    return lambda: jax.block_until_ready(both(own, teacher)), 2 * rows * size * widths


def generation_of(run: Run, work: Work) -> tuple[Callable[[], Any], int]:
    """Greedy generation by the student, and the FLOPs that the new tokens need."""
    model = run.models["student"]
    drawn = jax.jit(lambda key: stored(model.draw(key), run.policy))(jax.random.key(0))
    student = model.abstract().replace(params=drawn)
    prompts = np.random.default_rng(0).integers(
        0, model.config.vocab_size, (work.rows, work.tokens)
    )
    new = flops.forward(model.counted(drawn), work.rows, work.tokens, work.tokens)
    if work.tokens * 2 > model.config.max_tokens:
        raise ValueError("no room for as many tokens as the prompt has")
    sampling = generate.Sampling(work.tokens)
    return lambda: generate.generate(student, prompts, sampling), new


def main() -> None:
    args = arguments().parse_args()
    start_jax()
    work = work_of(args)
    run = build(config_of(work, args.tiny), devices=jax.devices()[:1])
    made = {
        "step": lambda: step_of(run),
        "loss": lambda: loss_of(run, work.rows * work.tokens),
        "generate": lambda: generation_of(run, work),
    }
    once, needed = made[work.kind]()

    def peak() -> int:
        found = jax.local_devices()[0].memory_stats()
        return found["peak_bytes_in_use"] if found else resident()

    device = jax.devices()[0].device_kind
    found = dict(flops=needed, peak_flops=peak_flops(), device=device)
    time_and_print(once, work, args.tiny, peak, **found)


if __name__ == "__main__":
    main()
