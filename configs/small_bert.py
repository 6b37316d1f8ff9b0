"""A BERT that two CPU cores can distil: MiniLM (6 layers, width 384) to 3 of its layers.

all-MiniLM-L6-v2 comes without a masked-LM head, so a teacher is made first: the head is drawn and
the whole model trained on masked WikiText. Baseline and student then start from its layers 2, 4, 6.
WikiText-2's validation split is the training text here, its test split is what is reported; a
tenth of the training articles selects the checkpoint.

    python -m kd_jax.main --config=configs/small_bert.py:teacher --workdir=runs/small_bert-teacher
    for seed in 0 1 2; do
      python -m kd_jax.main --config=configs/small_bert.py --config.seed=$seed \
        --config.teacher.model=runs/small_bert-teacher/export/teacher
    done

Text: the folder of WikiText-2's raw files under $KD_JAX_DATA/wikitext-2-raw (or in data/).
Seven minutes for the teacher, two to four for each other stage, on two cores.
Figures: docs/results.md.
"""

import os

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.base("pretrain")
    folder = os.path.join(os.environ.get("KD_JAX_DATA", "data"), "wikitext-2-raw")
    c.task = dict(name="mlm", seq_len=128)
    c.data = dict(
        train=dict(path=os.path.join(folder, "wiki.valid.raw")),
        test=dict(path=os.path.join(folder, "wiki.test.raw")),
        held_out=0.1,
    )
    c.teacher.model = "sentence-transformers/all-MiniLM-L6-v2"
    c.student.architecture = dict(num_hidden_layers=3)
    c.objective = dict(
        ce=dict(weight=1.0),
        kl=dict(weight=1.0, temperature=2.0),
        hidden=dict(weight=1.0, kind="mse", layers="uniform"),
    )
    c.batch_size = 16
    c.steps = 300
    c.stages = dict(baseline=dict(), student=dict())
    c.optim.learning_rate = 5e-4
    c.optim.schedule = dict(kind="linear", warmup=0.1)
    c.eval = dict(every=100, batch_size=32)
    c.checkpoint = dict(every=100, keep=1)
    c.log.every = 20
    if arg == "teacher":
        c.steps = 900
        c.stages = dict(teacher=dict())
        return c
    return or_smoke(c, arg)
