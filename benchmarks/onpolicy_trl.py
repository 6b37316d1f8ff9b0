"""One TRL process of the on-policy benchmark; prints one line of JSON.

TRL's DistillationTrainer as it is, in its own loop: transformers' generate with a KV cache writes,
the chunked kernel compares. Nothing is logged, evaluated or saved; activations are kept. In bf16
both models compute in autocast, over float32 weights, as TRL does by default. Its settings
torch_compile=True and cache_implementation="static" make no step here faster.
"""

import argparse
import json
import tempfile
import time

import datasets
import torch
import transformers
import trl
from onpolicy_cases import (
    BETAS,
    CLIP_NORM,
    EPSILON,
    LEARNING_RATE,
    WARM,
    WEIGHT_DECAY,
    arguments,
    prompts,
    sizes,
)
from timing import QUIET, Laps


class Trainer(trl.DistillationTrainer):
    """Keeps how long writing took, and of each step how much was written, and the loss."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tokens, self.losses = [], []

    def _prepare_inputs(self, generation_batch):
        start = time.perf_counter()
        inputs = super()._prepare_inputs(generation_batch)
        self.writing = time.perf_counter() - start
        self.tokens.append(int(inputs["num_items_in_batch"]))
        return inputs

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


class EndOfStep(transformers.TrainerCallback):
    """Stops a lap at the end of every step, the optimizer's part included."""

    def __init__(self, laps: Laps) -> None:
        self.laps, self.trainer = laps, None

    def on_step_end(self, *args, **kwargs):
        self.laps.end(writing=self.trainer.writing)


def train(args: argparse.Namespace, folder: str) -> dict:
    """Takes the steps; `folder` stays empty."""
    rows, new = sizes(args)
    settings = trl.DistillationConfig(
        output_dir=folder,
        max_steps=WARM + args.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_completion_length=new,
        temperature=1.0,
        beta=1.0,
        bf16=args.precision == "bf16",
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=CLIP_NORM,
        dataloader_drop_last=True,
        **QUIET,
    )
    end = EndOfStep(Laps(WARM))
    trainer = end.trainer = Trainer(
        model=str(args.folder / "student"),
        teacher_model=str(args.folder / "teacher"),
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts(args.folder)}),
        callbacks=[end],
    )
    end.laps.start()
    trainer.train()
    return end.laps.result(trainer.losses, tokens=trainer.tokens[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(parents=[arguments()])
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = train(args, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
