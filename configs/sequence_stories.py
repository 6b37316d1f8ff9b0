"""Sequence-level distillation that two CPU cores can train: stories260K into a third of its size.

Kim and Rush 2016, "Sequence-Level Knowledge Distillation" (arXiv:1606.07947), with samples of the
teacher in place of its beam search: it continues the beginnings of stories once, at temperature 1,
and the student learns its words by cross-entropy. Beside it a student of the same size, trained on
the stories themselves for as many steps of as many rows. The teacher is a Llama of 260,032
parameters, the students have 90,576. A few minutes on two cores.

    python -m kd_jax.main --config=configs/sequence_stories.py --workdir=runs/sequence_stories
    python -m kd_jax.main --config=configs/sequence_stories.py:smoke

Text: the real stories of $KD_JAX_DATA/lm_text, of which a share is held out for the figures; the
teacher is expected in models/stories260K next to $KD_JAX_DATA.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.base("distil")
    model, text = config.stories260k()
    c.task = dict(name="clm", seq_len=128, separator="bos")  # as the teacher was trained
    c.data = dict(train=dict(path=text), held_out=0.2)
    c.teacher.model = model
    c.student.init = "scratch"
    c.student.architecture = dict(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=104,
    )  # fmt: skip
    c.steps, c.batch_size = 1000, 32
    c.optim.learning_rate = 4e-3
    c.optim.schedule = dict(kind="cosine", warmup=0.05, final=0.1)
    c.eval = dict(every=250, batch_size=64)
    c.checkpoint = dict(every=250, keep=1)
    c = or_smoke(c, arg, family="llama")
    new = dict(prompt_tokens=8, max_new_tokens=16) if arg else dict(
        prompt_tokens=16, max_new_tokens=112, samples=32
    )  # fmt: skip
    c.stages = dict(baseline={}, sequence=dict(kind="sequence", **new))
    return c
