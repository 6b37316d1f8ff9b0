"""What the published code of slm_ensembles computes, but for its defects.

From that code (branch main), unlike configs/ensemble_qwen.py: pure KL to the teacher at T = 1, no
next-token loss; the last turn of each conversation is learnt, one conversation a row; new texts in
every round, with teacher and all members in the step, so that a step costs more in each round;
held-out losses are means over the means of batches.

Not followed: the loss mask of that code is not shifted, so that it learns what follows each token
of the answer, the last one's successor included; optimizer moments in bf16; vocabularies that are
cut to other sizes after the first round; gradients that some versions of its trainer sum over
micro-batches; rounds that count as done when their folder exists.

    python -m kd_jax.plan --config=configs/ensemble_qwen_faithful.py --topology=v5e:4x4
    python -m kd_jax.main --config=configs/ensemble_qwen_faithful.py --workdir=runs/faithful
    python -m kd_jax.main --config=configs/ensemble_qwen_faithful.py:smoke

Data: Tulu-3 from the hub. Hardware: a v5e-16 or GPUs of 80 GB; not run at this size here.
"""

from kd_jax import experiments
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = experiments.load("ensemble_qwen")
    c.task = dict(name="chat", seq_len=1024, turns="last", packed=False)
    c.objective = dict(kl=dict(weight=1.0, temperature=1.0))
    c.ensemble.rows, c.ensemble.fresh, c.ensemble.eval_mean = 0, True, "batch"
    return or_smoke(c, arg, family="qwen2")
