"""The second phase of "kdslm" on SQuAD: answers to questions, BERT-base to a 6-layer student.

The teacher is fine-tuned first, then the student on the labels (baseline), and on the labels and
the teacher's softened start and end positions (DistilBERT, arXiv:1910.01108, section 3: 0.5 and
0.5, T = 2). Exact match and F1 by the official rules; on v2.0 the threshold for "no answer" is
tuned on held-out training articles.

    python -m kd_jax.main --config=configs/finetune_squad.py:v2

Arguments: v1 (default), v2; `-smoke` behind one runs it tiny, on made-up data. The student is
DistilBERT; --config.student.model=RUN/export/student takes one of your own. Published for
orientation: DistilBERT distilled on v1.1 79.1 EM, 86.9 F1; BERT-base 81.2 EM, 88.5 F1. Some hours
on one GPU; the full run has not been made here. A small one that has: configs/small_finetune.py.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning

DATA = {"v1": "rajpurkar/squad", "v2": "rajpurkar/squad_v2"}


def get_config(arg=None):
    name, smoke = config.split(arg, DATA, "v1")
    c = config.finetuning()
    c.task = dict(name="squad", seq_len=384, doc_stride=128)
    hub = dict(source="hub", path=DATA[name])
    c.data = dict(train=hub, test=hub | dict(split="validation"), held_out=0.1)
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.model = "distilbert/distilbert-base-uncased"
    c.student.init = "model"
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    c.stages = dict(teacher=dict(), baseline=dict(), student=dict())
    c.optim.learning_rate = 3e-5
    return smoke_finetuning(c) if smoke else c
