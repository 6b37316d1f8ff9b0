"""Qwen2.5-Instruct into a smaller Qwen2.5-Instruct on conversations: 7B to 1.5B, 72B to 7B.

Teacher and student are published chat models that share their tokenizer. Labels and the teacher's
distribution count the same, as in configs/distil_chat.py; learning rates and lengths are choices of
this project. Data: Tulu-3 (Lambert et al. 2024, arXiv:2411.15124), 940,000 conversations, packed
into rows of 2,048 tokens.

    python -m kd_jax.plan --config=configs/distil_qwen.py:7b --topology=v5e:4x4
    python -m kd_jax.main --config=configs/distil_qwen.py:7b --workdir=runs/qwen_7b
    python -m kd_jax.main --config=configs/distil_qwen.py:smoke

Arguments: 7b (default), 72b; `-smoke` behind one runs it tiny, on made-up data. Parameters are
split over all chips of a TPU v5e-16 (7b) or v5e-64 (72b), each of which computes one row at a time;
on a cluster: launch/ (one command a host). docs/scaling.md has the memory, FLOPs and hours that the
plan forecasts; the runs have not been made here, and no figure is published for them.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke

# Teacher, student, chips, micro-batches of one row a chip, steps.
SIZES = {"7b": ("7B", "1.5B", 16, 4, 4_000), "72b": ("72B", "7B", 64, 2, 2_000)}


def get_config(arg=None):
    name, smoke = config.split(arg, SIZES, "7b")
    teacher, student, chips, accumulate, steps = SIZES[name]
    c = config.base("pretrain")
    c.task = dict(name="chat", seq_len=2048)
    c.data = dict(train=dict(source="hub", path="allenai/tulu-3-sft-mixture"), held_out=0.005)
    c.teacher.model = f"Qwen/Qwen2.5-{teacher}-Instruct"
    c.student.model = f"Qwen/Qwen2.5-{student}-Instruct"
    c.student.init = "model"
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5))
    c.mesh.fsdp, c.remat = chips, True
    c.batch_size, c.accumulate, c.steps = chips * accumulate, accumulate, steps
    c.stages = dict(student=dict())
    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.0
    c.optim.schedule = dict(kind="cosine", warmup=0.03)
    c.eval = dict(every=500, batch_size=chips)
    c.checkpoint = dict(every=500, keep=1)
    return or_smoke(c, "smoke" if smoke else None, family="qwen2")
