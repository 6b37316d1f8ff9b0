"""ISKD on a fine-tuned BERT: its blocks are replaced by compact ones while the classifier trains.

Musaeus and van der Goot (COLING 2025 main 440) replace blocks of causal language models, see
configs/substitute_gpt2.py; here the model is a classifier. BERT-base is fine-tuned on SST-2, then
its blocks become bottlenecks of half the width and half the heads, one every 1,000 steps from the
last to the first, until 30% of the parameters are gone (7 of 12 blocks, 30.19%). The loss is that
of the labels, the fine-tuned model's softened logits and its hidden states; compact blocks have ten
times the learning rate of all else. `student` has all of these blocks compact from the start, and
sees the same batches. Held-out training data select; the figures are those of SST-2's dev split.

    python -m kd_jax.plan --config=configs/substitute_classifier.py
    python -m kd_jax.main --config=configs/substitute_classifier.py
    python -m kd_jax.main --config=configs/substitute_classifier.py:smoke

Any task on examples and any BERT, DistilBERT or RoBERTa will do; without the stage `teacher`, the
checkpoint is taken as fine-tuned already. Further stages make models of the same size of it:
--config.stages.prune.steps=11400 by L1 norms, --config.stages.theseus.steps=11400 by compact blocks
that are drawn at random. Data: GLUE from the hub. Hardware: one GPU of 16 GB, about an hour; not
run at this size here.
"""

from kd_jax import config
from kd_jax.smoke import smoke_finetuning


def get_config(arg=None):
    _, smoke = config.split(arg, ("full",), "full")
    c = config.substitution(config.finetuning())
    c.task = dict(name="glue", task="sst2", seq_len=64)
    c.data = dict(held_out=0.1)
    c.teacher.model = "google-bert/bert-base-uncased"
    c.objective = dict(
        ce=dict(weight=0.5),
        kl=dict(weight=0.5, temperature=2.0),
        hidden=dict(weight=0.1, kind="cosine", layers="uniform"),
    )
    c.substitution.update(kind="bottleneck", width=384, num_heads=6, num_kv_heads=6, ffn_width=1536)
    c.substitution.learning_rate = 2e-4
    c.optim.learning_rate = 2e-5
    c.steps, c.eval.every = 11_400, 950  # 6 epochs, with 7 swaps in the first 6,000 steps
    c.stages = dict(teacher=dict(steps=5_700), substitute=dict(), student=dict())
    if smoke:
        smoke_finetuning(c).task.seq_len = 8  # one length: each of the models compiles its own step
    return c
