"""Sequential ensembles that two CPU cores can train: stories260K into models a fifth of its size.

The method is that of configs/ensemble_qwen.py, but that a round's student begins as the member
before it: there is no pretrained model of this size, and 300 steps from random values are too few
(--config.ensemble.start=student: the mean is then further from the teacher with every member). The
teacher is a Llama of 260,032 parameters; five members of 51,168 are together a little smaller.
`:half` has five of 128,688. Four runs of one round to compare with, in which a single student has
all steps, on the same rows:

    :longer        as large as a member, as many steps as the ensemble
    :longer_flops  as many FLOPs
    :larger        as large as the ensemble
    :larger_flops

    python benchmarks/sampled_text.py --model=$KD_JAX_DATA/../models/stories260K --texts=12000 \
      --out=runs/sampled_stories.txt
    python -m kd_jax.main --config=configs/ensemble_stories.py --workdir=runs/ensemble_stories
    python -m kd_jax.main --config=configs/ensemble_stories.py:smoke

Text: stories that the teacher wrote itself (benchmarks/sampled_text.py); reported on real ones, of
which none is trained on. The model is expected in models/stories260K next to $KD_JAX_DATA.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke

# Width, layers, heads, key-value heads, FFN width.
MEMBER, HALF, WHOLE = (32, 3, 4, 2, 88), (48, 4, 6, 3, 132), (64, 5, 8, 4, 168)
STEPS, ROUNDS = 300, 5


def get_config(arg=None):
    variants = ("members", "half", "longer", "longer_flops", "larger", "larger_flops")
    name, smoke = config.split(arg, variants, "members")
    c = config.ensemble()
    model, text = config.stories260k()
    c.task = dict(name="clm", seq_len=256, separator="bos")  # as the teacher was trained
    c.data = dict(
        train=dict(path="runs/sampled_stories.txt"),
        test=dict(path=text),
        held_out=0.02,
    )
    c.teacher.model = model
    c.student.init = "scratch"
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5))
    c.rounds, c.steps, c.batch_size = ROUNDS, STEPS, 16
    c.ensemble.update(rows=2_400, start="previous")
    c.optim.learning_rate = 4e-3
    c.optim.schedule = dict(kind="cosine", warmup=0.05, final=0.1)
    c.eval = dict(every=100, batch_size=32)
    c.checkpoint = dict(every=100, keep=1)
    c.log.every = 50
    shape = HALF if name == "half" else WHOLE if name.startswith("larger") else MEMBER
    keys = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
    c.student.architecture = dict(zip(keys.split(), shape, strict=True))
    if name.startswith("l"):
        c.rounds, c.steps = 1, SINGLE[name]
    return or_smoke(c, "smoke" if smoke else None, family="llama")


# Steps of a single student; _flops: with which it takes as many FLOPs as the ensemble.
SINGLE = {
    "longer": ROUNDS * STEPS,
    "longer_flops": 1700,
    "larger": ROUNDS * STEPS,
    "larger_flops": 408,
}
