"""TinyBERT's general distillation: attention and hidden states of BERT-base on Wikipedia text.

Jiao et al., arXiv:1909.10351, section 3.2: a student of 4 layers of width 312 learns BERT-base's
attention scores, embeddings and hidden states (equations 7 to 9, one projection for all layers),
without labels or masked tokens; its last checkpoint is what configs/tinybert_sst2.py starts from.
The authors take 2.5 billion words of Wikipedia, 3 epochs, batch 256, 128 tokens, learning rate
1e-4.

    python -m kd_jax.main --config=configs/tinybert_general.py

`:smoke` runs it tiny, on generated text. Days on eight GPUs; the full run has not been made here.
Held-out loss and perplexity mean nothing here: the head is not trained.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.base("pretrain")
    wikipedia = dict(source="hub", path="wikimedia/wikipedia", name="20231101.en")
    c.task = dict(name="mlm", seq_len=128)
    c.data = dict(
        train=wikipedia | dict(split="train[2000:]"),
        test=wikipedia | dict(split="train[:2000]"),
        held_out=0.0005,
    )
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.architecture = dict(num_hidden_layers=4, hidden_size=312, intermediate_size=1200)
    c.student.init = "scratch"
    c.objective = dict(
        attention=dict(weight=1.0, kind="scores_mse", layers="uniform"),
        hidden=dict(weight=1.0, kind="mse", layers=config.with_embeddings(4, 12))
        | dict(shared_projection=True),
    )
    c.batch_size = 256
    c.steps = 300_000
    c.stages = dict(student=dict())
    c.optim.learning_rate = 1e-4
    c.optim.schedule = dict(kind="linear", warmup=0.1)
    c = or_smoke(c, arg)
    if arg == "smoke":
        c.student.architecture.hidden_size = 16
        c.objective.hidden.layers = config.with_embeddings(1, 2)
    return c
