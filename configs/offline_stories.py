"""What to keep of a teacher's answers: all logits, the largest ones, or draws, at equal bytes.

The teacher is a Llama of 260,032 parameters with 512 ids; the student has 51,168. Answers are
computed once, kept by content and found again by every seed. A variant says what is kept, and how
many bytes a token that takes:

    :all           all 512 logits                                            2,048
    :uniform       the 4 largest, the rest to each other id alike               28
    :bucket        the 4 largest, the others as one outcome                     28
    :renormalised  the 4 largest, which have all probability                    28
    :rskd          14 draws (RS-KD, arXiv:2503.16870)                           28
    :ce            nothing: the labels alone

    python benchmarks/sampled_text.py --model=$KD_JAX_DATA/../models/stories260K --texts=6000 \
      --out=runs/sampled_stories.txt
    python benchmarks/offline_runs.py --seeds=5      # all of them: results/offline_stories.json
    python -m kd_jax.main --config=configs/offline_stories.py:rskd --workdir=runs/offline_rskd
    python -m kd_jax.main --config=configs/offline_stories.py:smoke

Text: stories that the teacher wrote itself (benchmarks/sampled_text.py); reported on real ones, of
which none is trained on. Expected: RS-KD as :all but for noise, :renormalised too sure of itself.
The model is expected in models/stories260K next to $KD_JAX_DATA.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke

KEPT = {  # config.cache of each variant
    "all": dict(logits="all"),
    "uniform": dict(logits="top_k", top_k=4),
    "bucket": dict(logits="top_k", top_k=4, tail="bucket"),
    "renormalised": dict(logits="top_k", top_k=4, tail="renormalised"),
    "rskd": dict(logits="rskd", draws=14),
}


def get_config(arg=None):
    name, smoke = config.split(arg, (*KEPT, "ce"), "all")
    c = config.base("pretrain")
    model, text = config.stories260k()
    c.task = dict(name="clm", seq_len=256, separator="bos")  # as the teacher was trained
    c.data = dict(
        train=dict(path="runs/sampled_stories.txt"),
        test=dict(path=text),
        held_out=0.02,
    )
    c.teacher.model = model
    c.student.init = "scratch"
    c.student.architecture = dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=88,
    )
    c.stages = dict(student={} if name in KEPT else dict(objective=""))
    c.objective = dict(kl=dict(weight=1.0))
    if name in KEPT:
        c.cache = config.cache(max_gb=8.0)
        c.cache.update(KEPT[name])
    c.steps, c.batch_size = 600, 16
    c.optim.learning_rate = 4e-3
    c.optim.schedule = dict(kind="cosine", warmup=0.05, final=0.1)
    c.eval = dict(every=200, batch_size=32)
    c.checkpoint = dict(every=200, keep=1)
    c.log.every = 50
    return or_smoke(c, "smoke" if smoke else None, family="llama")
