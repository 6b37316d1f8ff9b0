"""BERT to DistilBERT on Financial PhraseBank: hard targets, soft targets, both.

The system reproduced fine-tunes BERT-base as the teacher and trains DistilBERT on the labels (CE)
and on the teacher's softened logits (KL); it reports 94.41 and 95.29% accuracy, 417.65 and 255.42
MB, and 7.66 and 3.98 ms a sample for teacher and student. Which sentences it tested on is not
published; here a seeded, stratified fifth of each level is the test split.

    python -m kd_jax.main --config=configs/finetune_phrasebank.py \\
      --config.data.train.path=FinancialPhraseBank-v1.0.zip

The argument is the level, AllAgree (default), 75Agree, 66Agree or 50Agree; `-smoke` behind it runs
it tiny, on made-up data. The zip, its folder or one of its files comes from the authors (Malo et
al. 2014): the hub has it as a script only. Minutes on a GPU. The full run has not been made here;
a small one that has: configs/small_finetune.py.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning

LEVELS = ("AllAgree", "75Agree", "66Agree", "50Agree")


def get_config(arg=None):
    level, smoke = config.split(arg, LEVELS, "AllAgree")
    c = config.finetuning()
    c.task = dict(name="phrasebank", level=level, seq_len=128)
    c.data = dict(train=dict(source="files", path="data/financial_phrasebank"), held_out=0.1)
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.model = "distilbert/distilbert-base-uncased"
    c.student.init = "model"
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    c.stages = dict(teacher=dict(), baseline=dict(), student=dict())
    c.epochs = 5.0
    return smoke_finetuning(c) if smoke else c
