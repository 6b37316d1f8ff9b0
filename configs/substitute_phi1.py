"""ISKD on Phi-1 (1.4 billion parameters): blocks are replaced by compact ones while it trains.

Musaeus and van der Goot, "Iterative Structured Knowledge Distillation" (COLING 2025 main 440), as
configs/substitute_gpt2.py, which says what is the paper's and what was chosen. They report 30.16%
fewer parameters, 4.93% more on CBT than Phi-1 itself, and 92.43% of its HellaSwag.

Chosen here: half of the width and half of the heads (1,024 and 16) in a bottleneck, an FFN of 4,352
columns, which makes 13 of 24 blocks 30.28% of the parameters; the blocks that change their input
least go first.

    python -m kd_jax.plan --config=configs/substitute_phi1.py
    python -m kd_jax.main --config=configs/substitute_phi1.py --workdir=runs/substitute_phi1
    python -m kd_jax.main --config=configs/substitute_phi1.py:smoke

Data: WikiText-103 from the hub. Hardware: a v5e-16 or eight GPUs, parameters split over four; not
run at this size here.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.substitution()
    c.task = dict(name="clm", seq_len=512)
    c.data = config.wikitext103()
    c.teacher.model = "microsoft/phi-1"
    c.stages = dict(substitute=dict())
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    c.substitution.update(
        kind="bottleneck",
        width=1024,
        num_heads=16,
        num_kv_heads=16,
        ffn_width=4352,
        order="importance",
        learning_rate=2e-4,
    )
    c.batch_size = 64
    c.steps = 20_000  # 13 swaps in the first 12,000
    c.remat = True
    c.optim.learning_rate = 2e-5
    c.optim.schedule = dict(kind="linear", warmup=0.02)
    return or_smoke(c, arg, family="phi")
