"""BERT-base to 6 of its layers on any of GLUE's nine tasks, named by the argument.

Tasks: cola, sst2 (default), mrpc, stsb, qqp, mnli, mnli_mismatched, qnli, rte, wnli; `-smoke`
behind one of them runs it tiny, on made-up data. The teacher is fine-tuned first; baseline and
student start from its layers 2, 4, ..., 12. The student learns from the labels and the teacher's
softened logits, on STS-B from the score and the teacher's score. GLUE's validation split is what
is reported (test labels are secret); a tenth of the training data chooses the epoch.

    python -m kd_jax.main --config=configs/finetune_glue.py:mrpc

Published for orientation: DistilBERT (arXiv:1910.01108, table 1) keeps 97% of BERT-base's mean
score over these tasks. From minutes (RTE, MRPC) to some hours (MNLI, QQP) on a GPU; the full runs
have not been made here. Files for GLUE's server: python -m kd_jax.evaluate --workdir=RUN
--out=DIR.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning

TASKS = {  # epochs
    "cola": 5.0,
    "sst2": 3.0,
    "mrpc": 5.0,
    "stsb": 5.0,
    "qqp": 3.0,
    "mnli": 3.0,
    "mnli_mismatched": 3.0,
    "qnli": 3.0,
    "rte": 10.0,
    "wnli": 5.0,
}


def get_config(arg=None):
    name, smoke = config.split(arg, TASKS, "sst2")
    c = config.finetuning()
    c.task = dict(name="glue", task=name, seq_len=128)
    c.data = dict(held_out=0.1)
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.architecture = dict(num_hidden_layers=6)
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    if name == "stsb":
        c.objective = dict(mse=dict(weight=0.5), logit_mse=dict(weight=0.5))
    c.stages = dict(teacher=dict(), baseline=dict(), student=dict())
    c.epochs = TASKS[name]
    return smoke_finetuning(c) if smoke else c
