"""One PyTorch process of the fine-tuning benchmark; prints one line of JSON.

Written as a careful PyTorch user would: HF modules, random batches padded to their longest
sentence, a fused AdamW, the teacher under no_grad, evaluation in inference_mode. With --compile
models and losses are one graph for all lengths.
"""

import argparse
import csv
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from finetune_cases import (
    BETAS,
    CE_WEIGHT,
    CLIP_NORM,
    EPSILON,
    EVAL_ROWS,
    KL_WEIGHT,
    LEARNING_RATE,
    ROWS,
    SEQ_LEN,
    TEMPERATURE,
    WEIGHT_DECAY,
    arguments,
    chosen,
    first_of_each,
)
from timing import run

WARM = 4  # batches


def read(file: pathlib.Path, tokenizer) -> tuple[list[list[int]], torch.Tensor]:
    """Token ids and labels of a .tsv of SST-2."""
    with file.open(newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    tokens = tokenizer([row[0] for row in rows], truncation=True, max_length=SEQ_LEN)["input_ids"]
    return tokens, torch.tensor([int(row[1]) for row in rows])


def padded(tokens: list[list[int]], ids: np.ndarray, pad: int) -> dict[str, torch.Tensor]:
    """The rows of a batch, as long as the longest of them."""
    lengths_B = torch.tensor([len(tokens[i]) for i in ids])
    tokens_BT = torch.full((len(ids), int(lengths_B.max())), pad)
    for row, i in zip(tokens_BT, ids, strict=True):
        row[: len(tokens[i])] = torch.tensor(tokens[i])
    mask_BT = (torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]).long()
    return {"input_ids": tokens_BT, "attention_mask": mask_BT}


def load(folder: pathlib.Path) -> torch.nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def evaluate(args: argparse.Namespace, tokenizer) -> None:
    tokens, _ = read(args.folder / "eval.tsv", tokenizer)
    model = load(args.folder / "teacher").eval()

    def logits_of(batch):
        return model(**batch).logits

    if args.compile:
        logits_of = torch.compile(logits_of, dynamic=True)

    def one_pass() -> float:
        order = np.arange(len(tokens))
        if args.sort:
            order = np.argsort([len(row) for row in tokens], kind="stable")
        found = np.empty((len(tokens), 2), np.float32)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")
        with torch.inference_mode(), autocast:
            for start in range(0, len(order), EVAL_ROWS):
                ids = order[start : start + EVAL_ROWS]
                logits_BC = logits_of(padded(tokens, ids, tokenizer.pad_token_id))
                found[ids] = logits_BC.float().numpy()
        return float(found.mean(axis=0)[0])

    run(one_pass, argparse.Namespace(warmup=1, steps=args.steps))


def train(args: argparse.Namespace, tokenizer) -> None:
    distill = args.work == "distill"
    tokens, labels = read(args.data / "train.tsv", tokenizer)
    student = load(args.folder / ("student" if distill else "teacher")).train()
    teacher = load(args.folder / "teacher").eval().requires_grad_(False) if distill else None
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )

    def loss_of(batch, labels_B):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            student_BC = student(**batch).logits
            if teacher is not None:
                with torch.no_grad():
                    teacher_BC = teacher(**batch).logits
        student_BC = student_BC.float()
        ce = F.cross_entropy(student_BC, labels_B)
        if teacher is None:
            return ce
        kl = F.kl_div(
            F.log_softmax(student_BC / TEMPERATURE, dim=-1),
            F.log_softmax(teacher_BC.float() / TEMPERATURE, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        return CE_WEIGHT * ce + KL_WEIGHT * TEMPERATURE**2 * kl

    if args.compile:
        loss_of = torch.compile(loss_of, dynamic=True)
    order_N = np.random.default_rng(0).permutation(len(tokens))
    batches = order_N[: len(order_N) // ROWS * ROWS].reshape(-1, ROWS)
    lengths_S = np.array([max(len(tokens[i]) for i in ids) for ids in batches])
    warm, timed = first_of_each(lengths_S, WARM), chosen(lengths_S, args.steps)
    numbers = iter(warm + timed)

    def step() -> float:
        ids = batches[next(numbers)]
        batch = padded(tokens, ids, tokenizer.pad_token_id)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch, labels[ids])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
        optimizer.step()
        return loss.item()

    run(step, argparse.Namespace(warmup=len(warm), steps=len(timed)))


def main() -> None:
    parser = argparse.ArgumentParser(parents=[arguments()])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sort", action="store_true", help="evaluate in the order of length")
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder / "teacher")
    (evaluate if args.work == "evaluate" else train)(args, tokenizer)


if __name__ == "__main__":
    main()
