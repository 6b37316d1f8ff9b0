"""Two teachers on AG News, BERT and RoBERTa, for one DistilBERT; at once, or one after the other.

Each teacher is fine-tuned first and reads the texts with its own tokenizer. `together` (default):
the student learns from the labels and the mean of both teachers' logits
(--config.average=probabilities: from the mixture of their distributions). `sequential`: BERT-base
learns from BERT-large, DistilBERT from BERT-base, the assistant (Mirzadeh et al.,
arXiv:1902.03393). What configs/finetune_agnews.py's authors left as future work; settings are its.

    python -m kd_jax.main --config=configs/multi_teacher_agnews.py

`-smoke` behind the argument runs it tiny, on made-up data. No figures are published. Two hours on
one GPU; the full run has not been made here.
"""

from kd_jax import config, experiments
from kd_jax.smoke import smoke_finetuning


def get_config(arg=None):
    name, smoke = config.split(arg, ("together", "sequential"), "together")
    c = experiments.load("finetune_agnews")
    if name == "together":
        c.teachers.roberta = config.teacher("FacebookAI/roberta-base")
        c.stages = dict(teacher={}, roberta={}, baseline={}, student={})
    else:
        c.teacher.model = "google-bert/bert-large-uncased"
        c.assistant.model = "google-bert/bert-base-uncased"
        c.assistant.init = "model"
        c.stages = dict(teacher={}, assistant={}, baseline={}, student={})
    return smoke_finetuning(c) if smoke else c
