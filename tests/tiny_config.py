"""The smallest run there is, with dropout: --config=tests/tiny_config.py:TEXT_FILE."""

from pathlib import Path

from kd_jax.config import base

TEXT = "\n\n".join(
    f"the cat sat on mat {i} and the dog ran to river {i % 7}. a bird sang song {i % 13} at dawn"
    for i in range(400)
)


def write_text(folder: Path) -> Path:
    """A file to give to `get_config`."""
    file = folder / "text.txt"
    file.write_text(TEXT)
    return file


def get_config(text: str):
    """A teacher of one layer and its student, six steps each, a checkpoint every two."""
    c = base("pretrain")
    c.precision = "fp32"
    c.batch_size = 8
    c.steps = 6
    c.stages = dict(teacher={}, student={})
    c.teacher.architecture = dict(
        model_type="bert",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    c.student.architecture = dict(num_hidden_layers=1)
    c.tokenizer = dict(path="", train="wordpiece", vocab_size=128)
    c.objective = dict(ce=dict(weight=1.0), kl=dict(weight=1.0, temperature=2.0))
    c.optim.learning_rate = 1e-2
    c.task = dict(name="mlm", seq_len=16)
    c.data = dict(train=dict(source="files", path=text), held_out=0.1)
    c.eval = dict(every=2, batch_size=64)
    c.checkpoint = dict(every=2, keep=2)
    c.log = dict(every=2)
    return c
