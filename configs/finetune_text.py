"""BERT to DistilBERT on your own labelled texts: .csv, .tsv, .jsonl, .parquet, or the hub.

Teacher, baseline and student as in configs/finetune_agnews.py, with equal weights of labels and
teacher. Columns and files are settings; classes are those that occur in the training file.

    python -m kd_jax.main --config=configs/finetune_text.py --config.data.train.path=train.csv \\
      --config.data.test.path=test.csv --config.task.text=review --config.task.label=stars

A second text of each row: --config.task.pair=COLUMN. Rows of the hub:
--config.data.train.source=hub and the id as path. `:smoke` runs it tiny, on made-up data. How good
it is depends on your texts; what it takes: some minutes for 10,000 short texts on one GPU.
"""

from ml_collections import config_dict

from kd_jax import config
from kd_jax.smoke import smoke_finetuning


def get_config(arg=None):
    _, smoke = config.split(arg, ("full",), "full")
    c = config.finetuning()
    c.task = dict(name="labelled_text", text="text", label="label", seq_len=128)
    c.task.pair = config_dict.placeholder(str)
    c.data = dict(
        train=dict(source="files", path="train.csv"),
        test=dict(source="files", path="test.csv"),
        held_out=0.1,
    )
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.model = "distilbert/distilbert-base-uncased"
    c.student.init = "model"
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    c.stages = dict(teacher=dict(), baseline=dict(), student=dict())
    return smoke_finetuning(c) if smoke else c
