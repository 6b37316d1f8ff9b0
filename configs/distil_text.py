"""A language model into fewer of its layers, on your own text: a GPT-2, Llama or Qwen, or a BERT.

The teacher is taken as it is: a folder in Hugging Face's format, or an id on its hub. Baseline and
student both start from layers spread evenly over the teacher's. The baseline is trained on the text
alone, the student on the teacher as well (KL at T = 2), so that the table shows what the
teacher adds. A tenth of the documents is held out: it chooses the checkpoint, and is what is
reported unless there is a text of its own for that (--config.data.test.path).

    python -m kd_jax.main --config=configs/distil_text.py --config.data.train.path=texts/ \\
      --config.teacher.model=MODEL --config.student.architecture.num_hidden_layers=6

Texts are .txt, .jsonl, .csv, .tsv or .parquet, one file, a folder or a pattern; of a table
--config.data.train.text=COLUMN is read. `:masked` takes BERT and masks 15% of the words. `:smoke`
and `:masked-smoke` run it tiny, on text that comes with Python. What it takes: 2,000 steps of 32 x
512 tokens are 33 million tokens, for GPT-2 to six layers about 3e16 FLOPs: minutes on one GPU, days
on two CPU cores (there, fewer steps of shorter rows: --config.steps, --config.task.seq_len).
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    kind, smoke = config.split(arg, ("causal", "masked"), "causal")
    c = config.base("pretrain")
    c.task = dict(name="clm" if kind == "causal" else "mlm", seq_len=512)
    c.data = dict(train=dict(source="files", path="texts/", text="text"), held_out=0.1)
    c.teacher.model = (
        "openai-community/gpt2" if kind == "causal" else "google-bert/bert-base-uncased"
    )
    c.student.architecture = dict(num_hidden_layers=6)
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=1.0, temperature=2.0))
    c.batch_size, c.steps = 32, 2_000
    c.stages = dict(baseline=dict(), student=dict())
    c.optim.learning_rate = 2e-4
    c.optim.schedule = dict(kind="cosine", warmup=0.05)
    c.eval = dict(every=200, batch_size=32)
    c.checkpoint = dict(every=200, keep=2)
    family = "gpt2" if kind == "causal" else "bert"
    return or_smoke(c, "smoke" if smoke else None, family)
