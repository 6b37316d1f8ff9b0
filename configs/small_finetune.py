"""Fine-tuning that two CPU cores can do: MiniLM (6 layers, width 384) to 3 of its layers.

One task each as argument: agnews, sst2, phrasebank (AllAgree), phrasebank50 (50Agree), stsb,
squad. `:TASK-smoke` runs one tiny, on made-up data; `:TASK-teacher` fine-tunes all-MiniLM-L6-v2
once; the runs take it as their teacher, and start baseline and student from its layers 2, 4, 6:

    python -m kd_jax.main --config=configs/small_finetune.py:agnews-teacher \
      --workdir=runs/agnews-teacher
    for seed in 0 1 2 3 4; do
      python -m kd_jax.main --config=configs/small_finetune.py:agnews --config.seed=$seed \
        --config.teacher.model=runs/agnews-teacher/export/teacher
    done

The student learns the labels, the teacher's logits, and its hidden states: two layers of the
teacher to one of the student. Logits alone say little here, since the teacher knows its training
examples by heart. Learning rates are the best of three for baseline and student each, on held-out
PhraseBank (configs/small_sweep.py, another seed); there and on STS-B the student was tried with and
without hidden states. All of it serves for all tasks.

SQuAD's training questions are those of cs224n-dev whose context is not in xquad.en; of its 16
articles all are in both, as other paragraphs.

Data: the folders ag_news, glue, financial_phrasebank and squad of $KD_JAX_DATA (or of data/), in
their original layouts. Figures, times and machine: docs/results.md.
"""

import os

from kd_jax import config
from kd_jax.smoke import smoke_finetuning

# Epochs of the teacher, epochs of the student, rows of a batch, tokens of a row.
TASKS = {
    "agnews": (3.0, 2.0, 64, 128),
    "sst2": (2.0, 1.0, 64, 64),
    "phrasebank": (6.0, 6.0, 32, 96),
    "phrasebank50": (6.0, 4.0, 32, 96),
    "stsb": (4.0, 4.0, 32, 96),
    "squad": (3.0, 2.0, 16, 320),
}


def _files(*path: str) -> dict:
    return dict(source="files", path=os.path.join(os.environ.get("KD_JAX_DATA", "data"), *path))


def _task(name: str, seq_len: int) -> tuple[dict, dict]:
    """config.task and config.data."""
    if name == "agnews":
        data = dict(train=_files("ag_news", "alps_dev.tsv"), test=_files("ag_news", "test.csv"))
        return dict(name="agnews", seq_len=seq_len), data
    if name in ("sst2", "stsb"):
        folder = _files("glue", {"sst2": "SST-2", "stsb": "STS-B"}[name])
        return dict(name="glue", task=name, seq_len=seq_len), dict(train=folder, test=folder)
    if name in ("phrasebank", "phrasebank50"):
        level = "AllAgree" if name == "phrasebank" else "50Agree"
        data = dict(train=_files("financial_phrasebank"))
        return dict(name="phrasebank", level=level, seq_len=seq_len), data
    if name == "squad":
        test = _files("squad", "xquad.en.json")
        data = dict(
            train=_files("squad", "cs224n-dev-v2.0.json")
            | dict(without=test["path"], same_articles=True),
            test=test,
        )
        return dict(name="squad", seq_len=seq_len, best_non_null=True), data
    raise ValueError(f"unknown task {name!r}; have: {', '.join(TASKS)}")


def get_config(arg=None):
    teacher = (arg or "").endswith("-teacher")
    name, smoke = config.split((arg or "").removesuffix("-teacher"), TASKS, "agnews")
    c = config.finetuning()
    teacher_epochs, c.epochs, c.batch_size, seq_len = TASKS[name]
    c.task, c.data = _task(name, seq_len)
    c.data.held_out = 0.1
    c.teacher.model = "sentence-transformers/all-MiniLM-L6-v2"
    c.student.architecture = dict(num_hidden_layers=3)
    if name == "stsb":
        c.objective = dict(mse=dict(weight=0.5), logit_mse=dict(weight=0.5))
    else:
        c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    c.objective.hidden = dict(weight=10.0, kind="mse", layers="uniform")
    c.stages = dict(baseline=dict(), student=dict())
    c.optim.learning_rate = 3e-4  # of 3e-5, 1e-4, 3e-4: configs/small_sweep.py
    if teacher:
        c.optim.learning_rate = 5e-5
        c.epochs = teacher_epochs
        c.stages = dict(teacher=dict())
    return smoke_finetuning(c) if smoke else c
