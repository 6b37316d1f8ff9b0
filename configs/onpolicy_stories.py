"""On-policy distillation that two CPU cores can do: stories260K into a model of half its size.

The student begins as a model that was trained on stories of the teacher's (`:start`), and goes on
from there: in the share rollout.lambda of the steps it writes the rest of a story itself, of which
it is given the first 16 tokens, and learns from the teacher's distribution at each token it wrote
(Agarwal et al. 2023, arXiv:2306.13649). With lambda=0 it learns from the same stories as they were
told.

    python benchmarks/on_policy_runs.py --prepare    # runs/*.txt: real stories, and the teacher's
    python -m kd_jax.main --config=configs/onpolicy_stories.py:start --workdir=runs/onpolicy_start
    python -m kd_jax.main --config=configs/onpolicy_stories.py:kl --workdir=runs/onpolicy_stories
    python -m kd_jax.main --config=configs/onpolicy_stories.py:smoke

Arguments: kl (default), jsd, reverse_kl, policy_gradient: the divergence at each token; ce: the
stories alone, without a teacher; sequence: the teacher's words as labels; start. docs/results.md
has what came out of each, with five seeds.
The model is expected in models/stories260K next to $KD_JAX_DATA.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke

# 128,688 parameters, where the teacher has 260,032.
HALF = dict(
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=132,
)
TERMS = ("kl", "jsd", "reverse_kl", "policy_gradient", "ce")
WRITTEN = dict(prompt_tokens=16, max_new_tokens=240)
START = "runs/onpolicy_start/export/student"


def get_config(arg=None):
    name, smoke = config.split(arg, (*TERMS, "sequence", "start"), "kl")
    c = config.on_policy()
    c.task = dict(name="clm", seq_len=256, separator="bos")  # as the teacher was trained
    c.data = dict(
        train=dict(path="runs/real_stories.txt"),
        test=dict(path="runs/real_stories_test.txt"),
        held_out=0.1,
    )
    c.teacher.model, _ = config.stories260k()
    c.student.update(model=START, init="model", architecture=HALF)
    c.objective = {name if name in TERMS else "ce": dict(weight=1.0)}
    c.rollout.update(held_out=64, **WRITTEN)
    c.batch_size, c.steps = 16, 100
    c.optim.learning_rate = 1e-3
    c.optim.schedule = dict(kind="cosine", warmup=0.05, final=0.1)
    c.eval = dict(every=100, batch_size=16)
    c.checkpoint = dict(every=100, keep=1)
    c.log.every = 20
    if name == "ce":
        c.rollout["lambda"] = 0.0
    if name == "sequence":  # of 140 prompts about as many texts as 100 steps read
        own = dict(kind="sequence", objective="", samples=12)
        c.stages = dict(student=own | ({} if smoke else WRITTEN))
    if name == "start":  # the best by held-out text
        c.student.update(model="", init="scratch")
        c.stages, c.steps, c.batch_size = dict(student=dict()), 800, 16
        c.data.train.path = "runs/sampled_stories.txt"
        c.optim.learning_rate = 4e-3
    return or_smoke(c, "smoke" if smoke else None, family="llama")
