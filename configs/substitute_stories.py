"""ISKD on a model that two CPU cores can train: stories260K, a Llama of 5 blocks and width 64.

The method is that of configs/substitute_gpt2.py (Musaeus and van der Goot, COLING 2025 main 440),
here with slim blocks, which begin as the most important heads and FFN columns of the block that
they replace and are fitted to it before they go in. Beside it, with as many parameters and the same
batches: `prune`, structured L1 pruning and fine-tuning; `theseus`, the same compact blocks at
random; `student`, ordinary distillation of a model of compact blocks from the start. The model was
trained on TinyStories (Eldan and Li 2023, arXiv:2305.07759), of which a small file is at hand; a
fifth of its stories is held out and tells the best checkpoint.

    python -m kd_jax.main --config=configs/substitute_stories.py --workdir=runs/substitute_stories
    python -m kd_jax.main --config=configs/substitute_stories.py:smoke

More text, such as the model's own: --config.data.train.path=FILE. The model is expected in
models/stories260K next to $KD_JAX_DATA, the text in $KD_JAX_DATA/lm_text. Minutes on two cores.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.substitution()
    model, text = config.stories260k()
    c.task = dict(name="clm", seq_len=128, separator="bos")  # as it was trained
    c.data = dict(
        train=dict(path=text),
        held_out=0.2,
    )
    c.teacher.model = model
    c.stages = dict(substitute=dict(), prune=dict(), theseus=dict(), student=dict())
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    c.substitution.update(
        kind="slim",
        width=0,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=68,
        init="pruned",
        fit_steps=20,
        steps=40,
        learning_rate=2e-3,
        warmup=5,
    )
    c.batch_size = 16
    c.steps = 240
    c.optim.learning_rate = 5e-4
    c.optim.schedule = dict(kind="cosine", warmup=0.02, final=0.1)
    c.eval = dict(every=40, batch_size=64)
    c.checkpoint = dict(every=40, keep=1)
    c.log.every = 20
    if arg == "smoke":  # the others are in the smoke runs of substitute_gpt2 and prune_gpt2
        c.stages = dict(substitute=dict(), theseus=dict())
    return or_smoke(c, arg, family="llama")
