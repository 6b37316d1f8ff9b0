"""A small chat tokenizer, and conversations for it."""

from pathlib import Path

from kd_jax.data import tokenizers
from kd_jax.data.chats import Row

# One conversation to a turn, as ChatML has it.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["please tell me more about the little red house", "yes, the house is red and small"]


def tokenizer(folder: Path, template: str = CHATML):
    """Byte-level BPE with ChatML's two special tokens and `template`."""
    made = tokenizers.train_tokenizer("bpe", WORDS * 3, 290, folder)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def conversation(*contents: str, first: str = "user") -> list[dict]:
    """Messages that alternate between user and assistant."""
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return [
        {"role": roles[i] if i < len(roles) else roles[-2 + (i - len(roles)) % 2], "content": text}
        for i, text in enumerate(contents)
    ]


def encode(template, conversations, tools=None):
    """The tokens of each conversation; they stand in "row 0", "row 1", ..."""
    tools = tools or [None] * len(conversations)
    rows = [Row(f"row {i}", *row) for i, row in enumerate(zip(conversations, tools, strict=True))]
    return [tokens for some in template.encode(rows) for tokens in some]
