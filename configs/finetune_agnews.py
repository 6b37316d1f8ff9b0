"""BERT to DistilBERT on AG News: response-based distillation, and other students.

The system reproduced: BERT-base fine-tuned as the teacher, DistilBERT with 0.7 x CE + 0.3 x T^2
KL, T = 3, AdamW at 2e-5, 3 epochs, one cycle (10% up, cosine), clipping at 1.0, dropout 0.2 before
the classifier, 150 tokens. Its batch is 32 rows here (it is not published). Held-out training data
chooses the epoch; precision, recall and F1 by class of teacher, baseline and student are in
results.json and in the report of kd_jax.compare.

    python -m kd_jax.main --config=configs/finetune_agnews.py

Arguments: distilbert (default), tinybert (4 x 312, huawei-noah), mobilebert, distilroberta (with a
RoBERTa teacher: both read the same tokens). `-smoke` behind any of them runs it tiny,
on made-up data; alone it is DistilBERT's. All on one GPU with 16 GB: about an hour. The published
figures are those of the authors' notebook; the full run has not been made here. A small one that
has: configs/small_finetune.py.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning

STUDENTS = {
    "distilbert": "distilbert/distilbert-base-uncased",
    "tinybert": "huawei-noah/TinyBERT_General_4L_312D",
    "mobilebert": "google/mobilebert-uncased",
    "distilroberta": "distilbert/distilroberta-base",
}


def get_config(arg=None):
    name, smoke = config.split(arg, STUDENTS, "distilbert")
    c = config.finetuning()
    c.task = dict(name="agnews", seq_len=150)
    c.data = dict(held_out=0.1)
    roberta = name == "distilroberta"
    c.teacher.model = "FacebookAI/roberta-base" if roberta else "google-bert/bert-base-uncased"
    c.student.model = STUDENTS[name]
    c.student.init = "model"
    dropout = "seq_classif_dropout" if name == "distilbert" else "classifier_dropout"
    c.student.architecture = {dropout: 0.2}
    c.objective = dict(ce=dict(weight=0.7), kl=dict(weight=0.3, temperature=3.0))
    c.stages = dict(teacher=dict(), baseline=dict(), student=dict())
    c.optim.learning_rate = 2e-5
    c.optim.schedule = dict(kind="one_cycle", pct_start=0.1)
    c.optim.clip_norm = 1.0
    return smoke_finetuning(c) if smoke else c
