"""ISKD on GPT-2: blocks are replaced by compact ones, a few at a time, while the model trains.

Musaeus and van der Goot, "Iterative Structured Knowledge Distillation: Optimizing Language Models
Through Layer-by-Layer Distillation" (COLING 2025 main 440). They report 30.68% fewer parameters
with 79.82% of GPT-2's accuracy on CBT and 94.25% on HellaSwag, better than structured L1 pruning
and about as good as ordinary distillation.

From the paper: blocks with a smaller hidden dimension and fewer heads, progressive replacement
during training, and two learning rates, of compact blocks and of the rest. Chosen here, since we do
not know it: half of the width and half of the heads (384 and 6) in a bottleneck, one block at a
time from the last to the first until 30% of the parameters are gone, which takes 8 of 12 blocks and
30.36%; text, steps, batch and both rates; KL at T = 2 and the hidden states in the loss. All are
settings. `student` is ordinary distillation of the same shape, all blocks compact from the start.

    python -m kd_jax.plan --config=configs/substitute_gpt2.py
    python -m kd_jax.main --config=configs/substitute_gpt2.py --workdir=runs/substitute_gpt2
    python -m kd_jax.main --config=configs/substitute_gpt2.py:smoke

Data: WikiText-103 from the hub. Hardware: one GPU of 80 GB or a v5e-4; not run at this size here.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.substitution()
    c.task = dict(name="clm", seq_len=512)
    c.data = config.wikitext103()
    c.teacher.model = "openai-community/gpt2"
    c.stages = dict(substitute=dict(), student=dict())
    c.objective = dict(
        ce=dict(weight=0.5),
        kl=dict(weight=0.5, temperature=2.0),
        hidden=dict(weight=0.1, kind="cosine", layers="uniform"),
    )
    c.substitution.update(kind="bottleneck", width=384, num_heads=6, num_kv_heads=6, ffn_width=1536)
    c.batch_size = 64
    c.steps = 12_000  # 8 swaps in the first 7,000
    c.optim.learning_rate = 5e-5
    c.optim.schedule = dict(kind="linear", warmup=0.02)
    return or_smoke(c, arg, family="gpt2")
