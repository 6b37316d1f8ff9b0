"""BERT-large to a 6-layer BERT on WikiText-103: the system "kdslm" in JAX.

The teacher is BERT-large as it comes (24 layers, 335 million parameters), the student has 6 of its
layers (108 million). Loss: cross-entropy on the masked tokens, KL to the teacher's softened logits,
and the teacher's hidden states. What kdslm does with DDP and AMP is here data parallelism over all
devices and bf16 products with float32 parameters. Its public description goes no further: weights,
temperature, layers, learning rate, batch and length of the run below are this project's choices.

    python -m kd_jax.main --config=configs/pretrain_wikitext.py

A batch is 512 rows of 512 tokens: 32 a chip on a TPU v5e-16. With fewer chips or less memory, the
same batch in micro-batches: --config.accumulate=4. Several hosts (a pod slice as here, SLURM and
Kubernetes: see launch/):

    NAME=kd ZONE=us-west4-a TYPE=v5litepod-16 WORKDIR=gs://BUCKET/runs/wikitext \\
      launch/tpu_pod.sh --config=configs/pretrain_wikitext.py

Expected figures: none are published, and the full run has not been made here, only its plan
(python -m kd_jax.plan --config=configs/pretrain_wikitext.py --topology=v5e:4x4). Baseline and
student need 4.5e18 FLOPs together: an hour on 16 v5e chips, should they reach 40% of their peak.
The figure to look for is a held-out loss of the student below the baseline's.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.base("pretrain")
    c.task = dict(name="mlm", seq_len=512)
    c.data = config.wikitext103()
    c.teacher.model = "google-bert/bert-large-uncased"
    c.student.architecture = dict(num_hidden_layers=6)
    c.objective = dict(
        ce=dict(weight=1.0),
        kl=dict(weight=1.0, temperature=2.0),
        hidden=dict(weight=1.0, kind="mse", layers="uniform"),
    )
    c.batch_size = 512
    c.steps = 10_000  # 22 passes over 117 million tokens
    c.stages = dict(baseline=dict(), student=dict())
    c.optim.learning_rate = 3e-4
    c.eval = dict(every=500, batch_size=256)
    c.checkpoint = dict(every=500, keep=2)
    return or_smoke(c, arg)
