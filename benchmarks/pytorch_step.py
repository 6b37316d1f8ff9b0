"""One PyTorch process of the benchmark: times the step of a case and prints one line of JSON.

Written as a careful PyTorch user would: HF modules, logits selected before they are cast to
float32 for the losses, a fused AdamW, the teacher under no_grad. With --compile teacher, student
and losses are one compiled graph, forward and backward.
"""

import argparse
import pathlib

import torch
import torch.nn.functional as F
import transformers
from cases import BETAS, EPSILON, LEARNING_RATE, TEMPERATURE, WEIGHT_DECAY
from timing import arguments, case_of, resident, run

# SDPA has no fused kernel for attention with dropout on CPU: HF's own code is the faster one for
# a GPT-2 student in eager mode (10% of the step); compiled, and for BERT, the two are close.
STUDENT_ATTENTION = {
    "cpu": {"gpt2": "eager", "bert": "sdpa"},
    "gpu": {"gpt2": "sdpa", "bert": "sdpa"},
}


def load(folder: pathlib.Path, model_type: str, attention: str) -> torch.nn.Module:
    auto = {"gpt2": transformers.AutoModelForCausalLM, "bert": transformers.AutoModelForMaskedLM}
    model = auto[model_type].from_pretrained(folder, attn_implementation=attention)
    model.config.use_cache = False
    return model


def selected_logits(model, tokens_BT, index_N, gather_first: bool):
    """Logits (N, V) of the supervised positions; index_N None means all positions."""
    if index_N is None:
        return model(tokens_BT).logits.flatten(0, 1)
    if not gather_first:
        return model(tokens_BT).logits.flatten(0, 1)[index_N]
    hidden_BTD = model.bert(tokens_BT).last_hidden_state
    return model.cls(hidden_BTD.flatten(0, 1)[index_N])


def main() -> None:
    parser = argparse.ArgumentParser(parents=[arguments()])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gather-first", action="store_true", help="head on masked tokens only")
    args = parser.parse_args()
    case = case_of(args)

    device = torch.device("cuda" if args.device == "gpu" else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in JAX; nothing on CPU
    teacher = load(args.models / "teacher", case.model_type, "sdpa").eval().requires_grad_(False)
    attention = STUDENT_ATTENTION[args.device][case.model_type]
    student = load(args.models / "student", case.model_type, attention).train()
    teacher, student = teacher.to(device), student.to(device)
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

    arrays = case.batch()
    tokens_BT = torch.from_numpy(arrays["tokens_BT"]).long().to(device)
    labels_N = torch.from_numpy(arrays["labels"]).long().flatten().to(device)
    index_N = None
    if case.masked < case.tokens:
        offsets_B1 = torch.arange(case.rows)[:, None] * case.tokens
        index_N = (torch.from_numpy(arrays["positions"]).long() + offsets_B1).flatten().to(device)

    def loss_of(tokens_BT, labels_N, index_N):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            with torch.no_grad():
                teacher_NV = selected_logits(teacher, tokens_BT, index_N, args.gather_first)
            student_NV = selected_logits(student, tokens_BT, index_N, args.gather_first)
        teacher_NV, student_NV = teacher_NV.float(), student_NV.float()
        ce = F.cross_entropy(student_NV, labels_N)
        kl = F.kl_div(
            F.log_softmax(student_NV / TEMPERATURE, dim=-1),
            F.log_softmax(teacher_NV / TEMPERATURE, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        return ce + TEMPERATURE**2 * kl

    if args.compile:
        loss_of = torch.compile(loss_of)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens_BT, labels_N, index_N)
        loss.backward()
        optimizer.step()
        return loss.item()

    run(step, args, resident if args.device == "cpu" else torch.cuda.max_memory_allocated)


if __name__ == "__main__":
    main()
