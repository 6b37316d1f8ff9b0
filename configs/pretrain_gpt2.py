"""DistilGPT-2: GPT-2 (124 million parameters) to 6 layers (82 million), on WikiText-103.

The triple loss of DistilBERT (Sanh et al. 2019, arXiv:1910.01108) for a causal model: 5
KL(teacher || student) at T = 2, 2 cross-entropy, 1 cosine distance of the last hidden states. The
authors of DistilGPT-2 distilled on OpenWebText and fine-tuned on WikiText-103 afterwards; this
config does it in one: the teacher is fine-tuned on WikiText-103 first, then baseline and student
start from six of its layers. The weights of the loss (DistilBERT's), the layers, the learning rates
and the length of the stages are choices of this project.

    python -m kd_jax.main --config=configs/pretrain_gpt2.py

A batch is 128 rows of 1,024 tokens in two micro-batches: on 16 chips, 4 rows a chip at a time. On a
cluster: launch/ (one command a host).

Expected: perplexity on WikiText-103's test split of 16.3 for GPT-2 fine-tuned on its training
split, and 21.1 for DistilGPT-2 (model card of distilbert/distilgpt2; one week on 8 V100 of 16 GB).
This run has not been made here. Its three stages need 1e18 FLOPs: a quarter of an hour on 16 v5e
chips, should they reach 40% of their peak.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.base("pretrain")
    c.task = dict(name="clm", seq_len=1024)
    c.data = config.wikitext103()
    c.teacher.model = "openai-community/gpt2"
    c.student.architecture = dict(num_hidden_layers=6)
    c.objective = dict(
        kl=dict(weight=5.0, temperature=2.0),
        ce=dict(weight=2.0),
        hidden=dict(weight=1.0, kind="cosine", layers="last"),
    )
    c.batch_size, c.accumulate = 128, 2
    c.steps = 4_500  # five passes over 119 million tokens
    c.stages = dict(
        teacher=dict(steps=1_800, optim=dict(learning_rate=5e-5)),
        baseline=dict(),
        student=dict(),
    )
    c.optim.schedule = dict(kind="cosine", warmup=0.05)
    c.eval = dict(every=300, batch_size=64)
    c.checkpoint = dict(every=300, keep=2)
    return or_smoke(c, arg, family="gpt2")
