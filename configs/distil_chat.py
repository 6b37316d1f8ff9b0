"""A chat model into a smaller one, on your own conversations: loss on the assistant's words alone.

The teacher is taken as it is; the student here is a smaller model of the same family, with the same
tokenizer. Both can be folders or hub ids. Baseline (labels alone) and student (labels and KL to the
teacher's distribution) start from the same parameters and see the same conversations.

    python -m kd_jax.main --config=configs/distil_chat.py --config.data.train.path=chats.jsonl
    python -m kd_jax.main --config=configs/distil_chat.py:smoke

A row of the file has a list `messages` of {"role", "content"} (--config.task.column for another
name); the tokenizer's own chat template makes the text. For the teacher with fewer of its layers
instead: --config.student.model= --config.student.init=teacher
--config.student.architecture.num_hidden_layers=14. Hardware: GPUs of 80 GB or a v5e-8 at this size;
`kd_jax.plan` says before. Not run at this size here; 1,000 steps of 16 x 1,024 tokens are 16
million tokens, about 6e16 FLOPs for the student and 5e16 for the teacher.
"""

from kd_jax import config
from kd_jax.smoke import or_smoke


def get_config(arg=None):
    c = config.base("pretrain")
    c.task = dict(name="chat", seq_len=1024, column="messages")
    c.data = dict(train=dict(source="files", path="chats.jsonl"), held_out=0.05)
    c.teacher.model = "Qwen/Qwen2.5-1.5B-Instruct"
    c.student.model = "Qwen/Qwen2.5-0.5B-Instruct"
    c.student.init = "model"
    c.student.architecture = dict()
    c.objective = dict(ce=dict(weight=0.5), kl=dict(weight=0.5))
    c.batch_size, c.steps = 16, 1_000
    c.stages = dict(baseline=dict(), student=dict())
    c.remat = True
    c.optim.learning_rate = 2e-5
    c.optim.weight_decay = 0.0
    c.optim.schedule = dict(kind="linear", warmup=50)
    c.eval = dict(every=250, batch_size=16)
    c.checkpoint = dict(every=250, keep=2)
    return or_smoke(c, arg, family="qwen2")
