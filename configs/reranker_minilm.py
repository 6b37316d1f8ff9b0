"""A smaller cross-encoder: ms-marco-MiniLM-L6-v2 into some of its layers.

The teacher reads a query and a passage together and gives one number, how well the passage answers;
the student begins as evenly spaced layers and learns that number (squared error) for the questions
of Stack Overflow and their duplicates, whose own labels are only used to select and to report: MAP
and MRR@10 of each question's candidates.

    python -m kd_jax.main --config=configs/reranker_minilm.py --workdir=runs/reranker
    python -m kd_jax.main --config=configs/reranker_minilm.py:smoke

Arguments: layers, 3 (default), 2 or 1. For one accelerator or more; the run has not been made here.
The export loads in sentence-transformers' CrossEncoder.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning


def get_config(arg=None):
    layers, smoke = config.split(arg, ("3", "2", "1"), "3")
    c = config.finetuning()
    c.task = dict(name="reranking", seq_len=128)
    source = dict(source="hub", path="mteb/stackoverflowdupquestions-reranking")
    c.data = dict(train=source, test=source, held_out=0.05)
    c.teacher.model = "cross-encoder/ms-marco-MiniLM-L6-v2"
    c.student.architecture = dict(num_hidden_layers=int(layers))
    c.stages = dict(student=dict())
    c.objective = dict(logit_mse=dict(weight=1.0))
    c.epochs, c.batch_size = 1.0, 64
    c.optim.learning_rate = 1e-4
    c.eval = dict(every=1000, batch_size=256)
    return smoke_finetuning(c) if smoke else c
