"""One PyTorch process of accelerator.py: times some work and prints one line of JSON.

As a careful user would write it: HF modules with SDPA, bf16 autocast, a fused AdamW, the head at
supervised positions alone, its loss in chunks that are computed again in the backward pass (whole
logits of 150,000 ids would not fit); --liger: Liger's fused losses instead.
"""

import torch
import torch.nn.functional as F
import transformers
from accelerator_cases import (
    CHUNK,
    LEARNING_RATE,
    TEMPERATURE,
    TINY,
    WEIGHT_DECAY,
    Work,
    arguments,
    time_and_print,
    work_of,
)
from timing import resident
from torch.utils.checkpoint import checkpoint

from kd_jax.models import blueprint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_of(name: str, work: Work, tiny: bool, layers: int = 0) -> torch.nn.Module:
    """A model of random weights, by the same built-in shapes as kd_jax's."""
    settings = dict(blueprint.preset(name))
    if tiny:
        heads = {"num_key_value_heads": 1} if settings["model_type"] == "qwen2" else {}
        settings = {"model_type": settings["model_type"], **TINY, **heads}
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings[token] = 0
    kind = settings.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **settings)
    if layers:
        config.num_hidden_layers = layers
    auto = transformers.AutoModelForMaskedLM if work.head == "mlm" else None
    auto = auto or transformers.AutoModelForCausalLM
    with DEVICE:
        model = auto.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = work.kind == "generate"
    return model


def features(model: torch.nn.Module, tokens_BT: torch.Tensor, positions: int) -> torch.Tensor:
    """What the unembedding of a model is multiplied with, (N, D)."""
    hidden_BTD = model.base_model(tokens_BT).last_hidden_state[:, :positions]
    if hasattr(model, "cls"):  # BERT's
        hidden_BTD = model.cls.predictions.transform(hidden_BTD)
    return hidden_BTD.flatten(0, 1)


def loss_of_rows(student_CD, student_VD, teacher_CD, teacher_VD, labels_C):
    size = min(len(student_VD), len(teacher_VD))
    student_CV = (student_CD @ student_VD.T)[:, :size].float()
    with torch.no_grad():
        teacher_CV = (teacher_CD @ teacher_VD.T)[:, :size].float()
        teacher_CV = F.log_softmax(teacher_CV / TEMPERATURE, dim=-1)
    ce = F.cross_entropy(student_CV, labels_C, reduction="sum")
    student_CV = F.log_softmax(student_CV / TEMPERATURE, dim=-1)
    return ce + TEMPERATURE**2 * F.kl_div(student_CV, teacher_CV, reduction="sum", log_target=True)


def chunked(student_ND, student_VD, teacher_ND, teacher_VD, labels_N):
    parts = zip(*(x.split(CHUNK) for x in (student_ND, teacher_ND, labels_N)), strict=True)
    return sum(
        checkpoint(loss_of_rows, own, student_VD, theirs, teacher_VD, labels, use_reentrant=False)
        for own, theirs, labels in parts
    ) / len(labels_N)


def liger(student_ND, student_VD, teacher_ND, teacher_VD, labels_N):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    size = min(len(student_VD), len(teacher_VD))
    ce = LigerFusedLinearCrossEntropyLoss()(student_VD, student_ND, labels_N)
    divergence = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    kl = divergence(student_ND, student_VD[:size], teacher_ND, teacher_VD[:size], labels_N)
    return ce + TEMPERATURE**2 * kl


def main() -> None:
    parser = arguments()
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--liger", action="store_true")
    args = parser.parse_args()
    work = work_of(args)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    loss = liger if args.liger else chunked
    student = model_of(work.student or work.teacher, work, args.tiny, work.layers)
    size = student.config.vocab_size
    tokens_BT = torch.randint(size, (work.rows, work.tokens), device=DEVICE)
    if work.kind == "generate":
        step = generation(student.eval().to(torch.bfloat16), tokens_BT, work)
    elif work.kind == "loss":
        step = loss_alone(loss, work, args)
    else:
        step = training(student.train(), loss, tokens_BT, work, args)

    def ended() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    peak = torch.cuda.max_memory_allocated if DEVICE.type == "cuda" else resident
    time_and_print(ended, work, args.tiny, peak)


def training(student, loss, tokens_BT, work: Work, args):
    teacher = model_of(work.teacher, work, args.tiny).eval().requires_grad_(False)
    teacher = teacher.to(torch.bfloat16)
    # As many positions as kd_jax's batch has slots: 15%, in eights.
    positions = work.tokens if work.head == "clm" else -(-15 * work.tokens // 800) * 8
    labels_N = torch.randint(student.config.vocab_size, (work.rows * positions,), device=DEVICE)
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1]},
        {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def whole(tokens_BT, labels_N):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            with torch.no_grad():
                theirs_ND = features(teacher, tokens_BT, positions)
            own_ND = features(student, tokens_BT, positions)
            heads = (model.get_output_embeddings().weight for model in (student, teacher))
            own_VD, theirs_VD = heads
            return loss(own_ND, own_VD, theirs_ND, theirs_VD, labels_N)

    if args.compile:
        whole = torch.compile(whole)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        whole(tokens_BT, labels_N).backward()
        optimizer.step()

    return step


def loss_alone(loss, work: Work, args):
    models = [
        transformers.AutoConfig.for_model(**blueprint.preset(each))
        for each in (work.teacher, work.student)
    ]
    size = TINY["vocab_size"] if args.tiny else min(each.vocab_size for each in models)
    widths = [TINY["hidden_size"] if args.tiny else each.hidden_size for each in models]
    rows = work.rows * work.tokens
    drawn = [
        torch.randn(count, width, device=DEVICE, dtype=torch.bfloat16)
        for width in widths
        for count in (rows, size)
    ]
    theirs_ND, theirs_VD, own_ND, own_VD = drawn
    own_ND.requires_grad_()
    own_VD.requires_grad_()
    labels_N = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    if args.compile:
        loss = torch.compile(loss)

    def step() -> None:
        own_ND.grad = own_VD.grad = None
        loss(own_ND, own_VD, theirs_ND, theirs_VD, labels_N).backward()

    return step


def generation(model, tokens_BT, work: Work):
    exactly = dict(max_new_tokens=work.tokens, min_new_tokens=work.tokens, do_sample=False)
    mask_BT = torch.ones_like(tokens_BT)

    @torch.no_grad()
    def step() -> None:
        model.generate(tokens_BT, attention_mask=mask_BT, pad_token_id=0, **exactly)

    return step


if __name__ == "__main__":
    main()
