"""Llama 3 into a smaller Llama 3 on web text: Llama-3.1-8B to 3.2-1B, Llama-3.1-70B to 8B.

Base models of one tokenizer, trained further on FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557)
with the teacher's distribution and the next token as targets. Meta made its 1B and 3B models with
logits of the 8B and 70B ones (model card of Llama 3.2), with weights and data that are not
published: those below, the learning rates and the lengths are choices of this project.

    python -m kd_jax.plan --config=configs/distil_llama.py:8b --topology=v5e:4x4
    python -m kd_jax.main --config=configs/distil_llama.py:8b --workdir=runs/llama_8b
    python -m kd_jax.main --config=configs/distil_llama.py:smoke

Arguments: 8b (default), rows of 4,096 tokens; 70b, rows of 2,048; `-smoke` behind one runs it tiny,
on made-up data. Parameters are split over all chips of a TPU v5e-16 (8b) or v5e-64 (70b), each of
which computes one row at a time; on a cluster: launch/ (one command a host). docs/scaling.md has
the memory, FLOPs and hours that the plan forecasts; the runs have not been made here. The hub asks
for the licence of these models (HF_TOKEN).
"""

from kd_jax import config
from kd_jax.smoke import or_smoke

# Teacher, student, tokens of a row, chips, micro-batches of one row a chip, steps.
SIZES = {
    "8b": ("Llama-3.1-8B", "Llama-3.2-1B", 4096, 16, 4, 4_000),
    "70b": ("Llama-3.1-70B", "Llama-3.1-8B", 2048, 64, 4, 2_000),
}


def get_config(arg=None):
    name, smoke = config.split(arg, SIZES, "8b")
    teacher, student, tokens, chips, accumulate, steps = SIZES[name]
    c = config.base("pretrain")
    c.task = dict(name="clm", seq_len=tokens)
    c.data = dict(
        train=dict(
            source="hub",
            path="HuggingFaceFW/fineweb-edu",
            name="sample-10BT",
            split="train[:1000000]",  # of 9.7 million documents, about a billion tokens
        ),
        held_out=0.001,
    )
    c.teacher.model = f"meta-llama/{teacher}"
    c.student.model = f"meta-llama/{student}"
    c.student.init = "model"
    c.objective = dict(ce=dict(weight=0.1), kl=dict(weight=0.9))
    c.mesh.fsdp, c.remat = chips, True
    c.batch_size, c.accumulate, c.steps = chips * accumulate, accumulate, steps
    c.stages = dict(student=dict())
    c.optim.learning_rate = 2e-5
    c.optim.weight_decay = 0.1
    c.optim.beta2 = 0.95
    c.optim.schedule = dict(kind="cosine", warmup=0.03)
    c.eval = dict(every=500, batch_size=chips)
    c.checkpoint = dict(every=500, keep=1)
    return or_smoke(c, "smoke" if smoke else None, family="llama")
