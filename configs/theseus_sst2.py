"""BERT-of-Theseus on SST-2: six blocks replace a fine-tuned BERT's twelve, at random at first.

Xu et al. 2020, "BERT-of-Theseus: Compressing BERT by Progressive Module Replacing"
(arXiv:2002.02925): each pair of the teacher's blocks is replaced by one with a probability that
grows linearly to 1, without any distillation loss; only the new blocks are trained. They report
91.5 on SST-2's dev split where BERT-base has 91.5 as well, and 92.2 against 93.5 on the test
server. From their code: rate min(6e-4 t + 0.3, 1); new blocks begin as the teacher's first six.

    python -m kd_jax.main --config=configs/theseus_sst2.py
    python -m kd_jax.main --config=configs/theseus_sst2.py --config.theseus.rate=0.5
    python -m kd_jax.main --config=configs/theseus_sst2.py:smoke

An hour on one GPU; the full run has not been made here. For decoders and language modelling it is a
stage of the recipe `substitute`: --config.stages="{'theseus': {}}" of configs/substitute_gpt2.py.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning


def get_config(arg=None):
    _, smoke = config.split(arg, ("full",), "full")
    c = config.finetuning()
    c.task = dict(name="glue", task="sst2", seq_len=64)
    c.data = dict(held_out=0.1)
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.architecture = dict(num_hidden_layers=6)
    c.objective = dict(ce=dict(weight=1.0))
    c.theseus.update(group=2, layers="first", steps=0.5)
    c.theseus.rate = dict(kind="linear", start=0.3, end=1.0, steps=1167)
    blocks = ((r"backbone/blocks/", 1.0), (".*", 0.0))
    c.stages = dict(teacher=dict(), theseus=dict(optim=dict(learning_rate_multipliers=blocks)))
    return smoke_finetuning(c) if smoke else c
