"""A GPT-2 that two CPU cores can train and distil: 6 layers of width 384 to 3, own BPE of 8,192.

The teacher (10.6 million parameters outside the embeddings) is trained first on mixed English text,
then baseline and student start from its layers 2, 4, 6. WikiText-2's test split, none of whose text
is trained on, is what is reported; 2% of the training documents select the checkpoint.

    python benchmarks/real_text.py --data=$KD_JAX_DATA --out=runs/real_text.txt
    python -m kd_jax.main --config=configs/small_gpt2.py:teacher --workdir=runs/small_gpt2-teacher
    for seed in 0 1 2; do
      python -m kd_jax.main --config=configs/small_gpt2.py --config.seed=$seed \
        --config.teacher.model=runs/small_gpt2-teacher/export/teacher
    done

Fifteen minutes for the teacher, two to four for each other stage, on two cores.
Figures: docs/results.md.
"""

import os

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.base("pretrain")
    folder = os.path.join(os.environ.get("KD_JAX_DATA", "data"), "wikitext-2-raw")
    c.task = dict(name="clm", seq_len=128)
    c.data = dict(
        train=dict(path="runs/real_text.txt"),
        test=dict(path=os.path.join(folder, "wiki.test.raw")),
        held_out=0.02,
    )
    c.student.architecture = dict(num_hidden_layers=3)
    c.objective = dict(
        ce=dict(weight=0.5),
        kl=dict(weight=1.0, temperature=2.0),
    )
    c.batch_size = 16
    c.steps = 400
    c.stages = dict(baseline=dict(), student=dict())
    c.optim.learning_rate = 1e-3
    c.optim.schedule = dict(kind="cosine", warmup=0.1, final=0.1)
    c.eval = dict(every=100, batch_size=32)
    c.checkpoint = dict(every=100, keep=1)
    c.log.every = 20
    if arg == "teacher":
        c.tokenizer = dict(path="", train="bpe", vocab_size=8192)
        c.teacher.architecture = dict(
            model_type="gpt2",
            n_embd=384,
            n_layer=6,
            n_head=6,
            n_positions=128,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
        c.steps = 1600
        c.stages = dict(teacher=dict())
        return c
    return or_smoke(c, arg, family="gpt2")
