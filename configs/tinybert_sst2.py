"""TinyBERT's task-specific distillation on SST-2: layers first, logits second.

Jiao et al., arXiv:1909.10351, section 3.2: a student of 4 layers of width 312 learns the
fine-tuned BERT-base's attention scores, embeddings and hidden states (stage `intermediate`,
equations 7 to 9, one projection for all layers), then its logits (stage `student`, equation 10, T
= 1). It starts from the authors' general TinyBERT, or from your own (configs/tinybert_general.py).
Learning rates 5e-5 and 3e-5, 10 and 3 epochs, batch 32 are the authors'; their data augmentation
is left out.

    python -m kd_jax.main --config=configs/tinybert_sst2.py

`:smoke` runs it tiny, on made-up data. Published: 92.6% on GLUE's test server for TinyBERT-4,
93.4% for BERT-base, with augmentation; without it the paper's ablation loses two to four points on
other tasks. Five hours on one GPU; the full run has not been made here.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning


def get_config(arg=None):
    _, smoke = config.split(arg, ("full",), "full")
    c = config.finetuning()
    c.task = dict(name="glue", task="sst2", seq_len=64)
    c.data = dict(held_out=0.1)
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.model = "huawei-noah/TinyBERT_General_4L_312D"
    c.student.init = "model"
    c.intermediate = dict(
        attention=dict(weight=1.0, kind="scores_mse", layers="uniform"),
        hidden=dict(weight=1.0, kind="mse", layers=config.with_embeddings(4, 12))
        | dict(shared_projection=True),
    )
    c.objective = dict(kl=dict(weight=1.0, temperature=1.0))
    c.stages = dict(
        teacher=dict(epochs=3.0),
        baseline=dict(epochs=3.0),
        intermediate=dict(epochs=10.0, optim=dict(learning_rate=5e-5)),
        student=dict(epochs=3.0),
    )
    c.optim.learning_rate = 3e-5
    if smoke:
        c = smoke_finetuning(c)
        c.student.architecture = dict(num_hidden_layers=1, hidden_size=16)
        c.student.init = "scratch"
        c.intermediate.hidden.layers = config.with_embeddings(1, 2)
    return c
