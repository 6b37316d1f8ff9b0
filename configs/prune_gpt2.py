"""Structured L1 pruning of GPT-2 by 30% of its parameters, then distillation from the original.

The baseline that ISKD is compared with (Musaeus and van der Goot, COLING 2025 main 440, who report
that substitution of blocks does better): the attention heads and FFN columns of the smallest L1
norm go (Li et al. 2017, arXiv:1608.08710), so that all shapes really are smaller. The results have
the pruned model's figures both before any training (`one_shot`) and after it (`prune`).

The paper does not say what is pruned, or how units are ranked. Here heads and columns of all layers
are ranked together by the mean |w| of their weights, the norm that goes for each parameter that is
saved, and one of each stays in every layer (pruning.ranking="layer" takes the same share from each
layer instead). It is done once; text, steps, batch, learning rate and loss are those of
configs/substitute_gpt2.py, and so are the batches. pruning.distil=False fine-tunes on the labels
alone. All are settings. To have substitution, pruning and ordinary distillation in one table, at
equal parameters: --config.stages of configs/substitute_gpt2.py takes `prune` too.

    python -m kd_jax.plan --config=configs/prune_gpt2.py
    python -m kd_jax.main --config=configs/prune_gpt2.py --workdir=runs/prune_gpt2
    python -m kd_jax.main --config=configs/prune_gpt2.py:smoke

Data: WikiText-103 from the hub. Hardware: one GPU of 80 GB or a v5e-4; not run at this size here.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.pruning()
    c.task = dict(name="clm", seq_len=512)
    c.data = config.wikitext103()
    c.teacher.model = "openai-community/gpt2"
    c.stages = dict(prune=dict())
    c.objective = dict(
        ce=dict(weight=0.5),
        kl=dict(weight=0.5, temperature=2.0),
        hidden=dict(weight=0.1, kind="cosine", layers="uniform"),
    )
    c.pruning.target = 0.3
    c.batch_size = 64
    c.steps = 12_000
    c.optim.learning_rate = 5e-5
    c.optim.schedule = dict(kind="linear", warmup=0.02)
    return or_smoke(c, arg, family="gpt2")
