"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): bert-base-uncased to 6 layers, triple loss.

Loss: 5 KL(teacher || student) at T = 2 over all tokens but padding, 2 masked-LM cross-entropy, and
1 cosine distance of the last hidden states. The student starts from layers 0, 2, 4, 7, 9, 11, the
embeddings and the head of the teacher; its positions stay as they are. Weights, optimizer and
initialisation are those of the authors' command and scripts. What differs:

- Text: English Wikipedia. The authors add the Toronto BookCorpus, which the hub has as a script
  only; give your copy by --config.data.train.source=files --config.data.train.path=FOLDER.
- Rows are full blocks of 512 tokens, 2,048 a step. The authors group documents by length and
  take 5 rows x 50 accumulated batches on each of 8 GPUs, 2,000 rows a step.
- Masked tokens are drawn uniformly; the authors draw rare tokens more often (smoothing 0.7).
- The teacher's first token type, which DistilBERT lacks, is added to the positions.
- A baseline, the same student trained on the labels alone, comes first; the authors have none.

    python -m kd_jax.main --config=configs/pretrain_distilbert.py

On a cluster: launch/ (one command a host). --config.objective.kl.positions=supervised takes the KL
of the masked tokens only (the authors' --restrict_ce_to_mask), for a fraction of the work.

Expected: 66 million parameters for 110, and 97% of BERT's score on GLUE's development sets (77.0
for 79.5), after three epochs and 90 hours on 8 V100 of 16 GB. Those are the authors' figures; this
run has not been made here. Baseline and student need 1.4e19 FLOPs: three hours on 16 v5e chips,
should they reach 40% of their peak.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.base("pretrain")
    wikipedia = dict(source="hub", path="wikimedia/wikipedia", name="20231101.en")
    c.task = dict(name="mlm", seq_len=512)
    c.data = dict(
        train=wikipedia | dict(split="train[2000:]"),
        test=wikipedia | dict(split="train[:2000]"),
        held_out=0.0005,  # 3,200 articles
    )
    c.teacher.model = "google-bert/bert-base-uncased"
    c.student.architecture = dict(model_type="distilbert", num_hidden_layers=6, hidden_dim=3072)
    c.student.layers = (0, 2, 4, 7, 9, 11)
    c.objective = dict(
        kl=dict(weight=5.0, temperature=2.0, positions="all"),
        ce=dict(weight=2.0),
        hidden=dict(weight=1.0, kind="cosine", layers="last"),
    )
    c.batch_size, c.accumulate = 2048, 8
    c.steps = 13_500  # about three passes over the text
    c.stages = dict(baseline=dict(), student=dict())
    c.optim = dict(
        learning_rate=5e-4,
        schedule=dict(kind="linear", warmup=0.05),
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.98,
        epsilon=1e-6,
        clip_norm=5.0,
        learning_rate_multipliers=((r"backbone/positions/", 0.0), (r".*", 1.0)),
    )
    c.eval = dict(every=500, batch_size=256)
    c.checkpoint = dict(every=250, keep=2)
    return or_smoke(c, arg)
