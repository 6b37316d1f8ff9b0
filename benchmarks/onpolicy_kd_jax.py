"""One kd_jax process of the on-policy benchmark; prints one line of JSON.

The stage of configs/onpolicy_stories.py in the loop that every run takes (`run.stage.train`), with
its records and metrics; the last step's checkpoint comes after the timed steps.
"""

import argparse
import json
import pathlib
import tempfile

from etils import epath
from onpolicy_cases import (
    BETAS,
    CLIP_NORM,
    EPSILON,
    LEARNING_RATE,
    PROMPT,
    TEXT,
    WARM,
    WEIGHT_DECAY,
    arguments,
    sizes,
)
from timing import Laps

from kd_jax import api
from kd_jax.run import stage, teaching
from kd_jax.run.run import build
from kd_jax.run.teaching import TeacherLogits
from kd_jax.train import loop


def configured(args: argparse.Namespace) -> api.Config:
    """The config of a run: reverse KL on what the student writes, and nothing else."""
    rows, new = sizes(args)
    last = WARM + args.steps
    changes = {
        "precision": args.precision,
        "batch_size": rows,
        "steps": last,
        "teacher.model": str(args.folder / "teacher"),
        "student.model": str(args.folder / "student"),
        "task.seq_len": PROMPT + new,
        "rollout.prompt_tokens": PROMPT,
        "rollout.max_new_tokens": new,
        "eval.every": last,
        "eval.batch_size": rows,
        "checkpoint.every": last,
        "log.every": 1,  # a row of timing for every step
        "optim.learning_rate": LEARNING_RATE,
        "optim.schedule": {"kind": "constant"},
        "optim.weight_decay": WEIGHT_DECAY,
        "optim.beta1": BETAS[0],
        "optim.beta2": BETAS[1],
        "optim.epsilon": EPSILON,
        "optim.clip_norm": CLIP_NORM,
    }
    config = api.configure("onpolicy_stories:reverse_kl", changes)
    with config.unlocked():
        config.student.architecture = {}  # as the checkpoint has it
        config.data = {"train": {"path": str(args.folder / TEXT)}, "held_out": 0.1}
        config.data.cache_dir = str(args.folder / "cache")
    return config


def train(args: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Takes the steps in a new run directory."""
    rows, _ = sizes(args)
    run = build(configured(args), epath.Path(folder))
    run.task.prepare()
    parameters = teaching.given_teachers(run)
    this = run.ready("student", parameters)
    logits = TeacherLogits(run, parameters)
    teacher, stream = teaching.teacher_and_batches(run, this, logits)
    laps, losses, tokens = Laps(WARM), [], []

    def listen(_: str, kind: str, row: dict) -> None:
        if kind == "train":
            losses.append(row["loss"])
            tokens.append(round(row["length"] * rows))
        if kind == "time" or row["step"] == 1:  # the step that compiles has no row of timing
            laps.end(writing=row.get("writing_seconds", 0.0))

    laps.start()
    stage.train(
        run,
        this,
        this.phases(run, parameters),
        stream=stream,
        teacher=teacher,
        validate=None,
        selection=loop.Selection(),
        directory=run.folder / this.name,
        listeners=[listen],
        writer=this.writing.writer(run, this),
    )
    return laps.result(losses, tokens=tokens[WARM:])


def main() -> None:
    args = argparse.ArgumentParser(parents=[arguments()]).parse_args()
    api.start()
    with tempfile.TemporaryDirectory() as folder:
        found = train(args, pathlib.Path(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
