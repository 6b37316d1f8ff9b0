"""One training process of the embedding benchmark; prints one line of JSON.

A student made of some layers of an embedder learns its vectors of lone texts, which are known
before. kd_jax: `api.distil` on configs/embedding_minilm.py, mean squared error.
sentence-transformers: SentenceTransformerTrainer and MSELoss, with the settings of its example of
distillation (batches of 64 texts in random order, AdamW, 1e-4, a tenth of the steps to warm up).
A lap is `LAP` steps; nothing is evaluated or saved in one.
"""

import argparse
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
from timing import QUIET, Laps

LAP = 10
RATE = 1e-4  # of sentence-transformers' example


def of_kd_jax(args: argparse.Namespace, laps: Laps) -> list[float]:
    from kd_jax import api
    from kd_jax.configs import embedding_minilm

    os.environ["KD_JAX_CACHE"] = str(args.vectors.parent / "cache")  # the teacher's, kept
    config = embedding_minilm.get_config(f"{args.layers}_mse")
    config.teacher.model, config.seed = str(args.model), args.seed
    config.data.train.path = str(args.texts)
    config.optim.learning_rate = args.rate
    config.steps = config.eval.every = args.steps
    config.log.every, losses = LAP, []

    def listen(_: str, kind: str, row: dict) -> None:
        if kind == "train":
            losses.append(row["loss"])
        if kind == "time":
            laps.end()

    laps.start()
    with tempfile.TemporaryDirectory() as folder:
        api.distil(config, workdir=pathlib.Path(folder, "run"), callback=listen)
    return losses


def of_pytorch(args: argparse.Namespace, laps: Laps) -> list[float]:
    import datasets
    import torch
    import transformers
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    from kd_jax.configs import embedding_minilm

    class EndOfLap(transformers.TrainerCallback):
        def on_step_end(self, settings: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % LAP == 0:
                laps.end()

    student = SentenceTransformer(str(args.model), device="cpu", local_files_only=True)
    config = embedding_minilm.get_config(str(args.layers))
    student.max_seq_length = config.task.seq_len
    bert = student[0].auto_model
    kept = [bert.encoder.layer[layer] for layer in config.student.layers]
    bert.encoder.layer = torch.nn.ModuleList(kept)
    bert.config.num_hidden_layers = args.layers
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=args.rate,
            warmup_steps=round(0.1 * args.steps),
            seed=args.seed,
            **QUIET,
        )
        texts = args.texts.read_text(encoding="utf-8").splitlines()
        given = datasets.Dataset.from_dict({"text": texts, "label": np.load(args.vectors)})
        trainer = SentenceTransformerTrainer(
            model=student,
            args=settings,
            train_dataset=given,
            loss=losses.MSELoss(student),
            callbacks=[EndOfLap()],
        )
        laps.start()
        loss = trainer.train().training_loss
    if args.out:
        student.save(str(args.out))
    return [loss]


SYSTEMS = {"kd_jax": of_kd_jax, "pytorch": of_pytorch}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", required=True, choices=SYSTEMS)
    parser.add_argument("--model", required=True, type=pathlib.Path, help="the teacher")
    parser.add_argument("--texts", required=True, type=pathlib.Path, help="one a line")
    parser.add_argument("--vectors", required=True, type=pathlib.Path, help="the teacher's, .npy")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=3, help="laps that are not timed")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=pathlib.Path, help="keep the student here")
    args = parser.parse_args()
    laps = Laps(args.warmup)
    losses = SYSTEMS[args.system](args, laps)
    print(json.dumps(laps.result(losses)))


if __name__ == "__main__":
    main()
