"""A sequential ensemble that two CPU cores can train: stories260K into models of half its width.

The method is that of configs/ensemble_qwen.py. The teacher is a Llama of 260,032 parameters; each
member has FIVE AT MOST of which together are as large as the teacher.

    python benchmarks/sampled_text.py --model=stories260K --out=runs/sampled_stories.txt
    python -m kd_jax.main --config=configs/ensemble_stories.py --workdir=runs/ensemble_stories
    python -m kd_jax.main --config=configs/ensemble_stories.py:smoke

Text: stories that the teacher wrote itself (benchmarks/sampled_text.py); reported on real ones, of
which none is trained on. The model is expected in models/stories260K beside $KD_JAX_DATA.
"""

import os

from configs import common


def get_config(arg=None):
    c = common.ensemble()
    data = os.environ.get("KD_JAX_DATA")
    c.task = dict(name="clm", seq_len=256)
    c.data = dict(
        train=dict(path="runs/sampled_stories.txt"),
        test=dict(path=os.path.join(data or "data", "lm_text", "tinystories_197k.txt")),
        held_out=0.02,
    )
    c.teacher.model = os.path.join(data, "..", "models", "stories260K") if data else "stories260K"
    c.student.init = "scratch"
    c.student.architecture = dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=88,
    )  # fmt: skip
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5))
    c.rounds, c.steps, c.batch_size = 6, 400, 16
    c.optim.learning_rate = 4e-3
    c.optim.schedule = dict(kind="cosine", warmup=0.05, final=0.1)
    c.eval = dict(every=100, batch_size=32)
    c.checkpoint = dict(every=100, keep=1)
    c.log.every = 20
    return common.variant(c, arg, family="llama")
