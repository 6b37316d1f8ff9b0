"""The second phase of "kdslm" on SST-2: its pretrained 6-layer student, fine-tuned and distilled.

A BERT-base teacher is fine-tuned on SST-2, then the student twice: on the labels, and with the
teacher (labels, softened logits, hidden states, as in pretraining). The student is what
configs/pretrain_wikitext.py or pretrain_distilbert.py exported; without one of your own,
DistilBERT.

    python -m kd_jax.main --config=configs/finetune_sst2.py \\
      --config.student.model=runs/pretrain/export/student

`:smoke` runs it tiny, on made-up data. The system publishes no figures; DistilBERT's paper
(arXiv:1910.01108) has 91.3% for DistilBERT and 92.7% for BERT-base on SST-2's dev split. An hour
on one GPU; the full run has not been made here. A small one that has: configs/small_finetune.py.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning


def get_config(arg=None):
    _, smoke = config.split(arg, ("full",), "full")
    c = config.finetuning()
    c.task = dict(name="glue", task="sst2", seq_len=64)
    c.data = dict(held_out=0.1)
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.model = "distilbert/distilbert-base-uncased"
    c.student.init = "model"
    c.objective = dict(
        ce=dict(weight=0.5),
        kl=dict(weight=0.5, temperature=2.0),
        hidden=dict(weight=0.1, kind="mse", layers="uniform"),
    )
    c.stages = dict(teacher=dict(), baseline=dict(), student=dict())
    return smoke_finetuning(c) if smoke else c
