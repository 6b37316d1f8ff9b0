"""A smaller BGE embedder: bge-base-en-v1.5 (12 layers, width 768) into some of its layers.

The teacher (Xiao et al. 2023, "C-Pack", arXiv:2309.07597) pools the first token. The student begins
as evenly spaced layers and learns its vectors of a million questions and answers (GooAQ), without
the pairs, by cosine and by the similarities among the texts of a batch. BGE's queries have a
prompt of their own in front, in training as well. Selected and reported by retrieval on NFCorpus,
in BEIR's files (Thakur et al. 2021, arXiv:2104.08663), of which no text is trained on.

    python -m kd_jax.plan --config=configs/embedding_bge.py --topology=v5e:2x4
    python -m kd_jax.main --config=configs/embedding_bge.py --workdir=runs/embedding_bge
    python -m kd_jax.main --config=configs/embedding_bge.py:smoke

Arguments: layers, 6 (default), 4 or 3. For one accelerator or more; the run has not been made here.
data/nfcorpus is a folder of BEIR's.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning

QUERY = "Represent this sentence for searching relevant passages: "


def get_config(arg=None):
    layers, smoke = config.split(arg, ("6", "4", "3"), "6")
    c = config.finetuning()
    c.task = dict(
        name="embedding",
        columns=("question", "answer"),
        scored="retrieval",
        query_prompt=QUERY,
        seq_len=256,
    )
    pairs = dict(source="hub", path="sentence-transformers/gooaq")
    c.data = dict(
        train=pairs,
        validation=dict(source="files", path="data/nfcorpus", split="dev"),
        test=dict(source="files", path="data/nfcorpus", split="test"),
    )
    c.teacher.model = "BAAI/bge-base-en-v1.5"
    c.student.architecture = dict(num_hidden_layers=int(layers))
    c.stages = dict(student=dict())
    c.objective = dict(
        embedding=dict(weight=1.0, kind="cosine"),
        similarity=dict(weight=1.0, t_squared=False),
    )
    c.epochs, c.batch_size = 0.35, 256
    c.optim.learning_rate = 1e-4
    c.eval = dict(every=500, batch_size=256)
    c.cache.max_gb = 20.0
    return smoke_finetuning(c) if smoke else c
