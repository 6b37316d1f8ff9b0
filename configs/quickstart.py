"""Distillation from nothing, without network, in a few minutes on two CPU cores.

Text is the English that every Python brings along (language reference, docstrings). A tokenizer
and a small BERT teacher are trained on it, then the same 2-layer student twice: on the labels alone
(baseline), and distilled from the teacher. Expect the distilled student to end below the baseline's
held-out loss.

    python -m kd_jax.main --config=configs/quickstart.py
"""

from configs import common


def get_config(arg=None):
    c = common.base("pretrain")
    c.task = dict(name="mlm", seq_len=64)
    c.data = dict(train=dict(source="python"), held_out=0.1)
    c.tokenizer = dict(path="", train="wordpiece", vocab_size=4096)
    c.teacher.architecture = dict(
        model_type="bert",
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    c.student.architecture = dict(num_hidden_layers=2)
    c.objective = dict(
        ce=dict(weight=1.0),
        kl=dict(weight=1.0, temperature=2.0),
        hidden=dict(weight=1.0, layers="uniform"),
    )
    c.batch_size = 64
    c.steps = 300
    c.stages = dict(teacher=dict(steps=900), baseline=dict(), student=dict())
    c.optim.learning_rate = 2e-3
    c.optim.schedule = dict(kind="linear", warmup=0.1)
    c.eval.every = 100
    c.checkpoint.every = 100
    c.log.every = 20
    return common.variant(c, arg)
