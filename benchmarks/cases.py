"""The two distillation steps that are timed: their shapes, batch and the FLOPs they need.

Read by every process of the benchmark, so it imports numpy alone: a row's peak memory is its own.
"""

import dataclasses
import math

import numpy as np

TEMPERATURE = 2.0
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclasses.dataclass(frozen=True)
class Case:
    """loss = CE + T^2 KL(teacher || student), each the mean over the same supervised positions."""

    name: str
    model_type: str  # gpt2: every token is supervised; bert: 15% of them
    vocab_size: int
    width: int
    heads: int
    teacher_layers: int
    student_layers: int
    rows: int
    tokens: int  # a row

    @property
    def masked(self) -> int:
        """Supervised positions of a row."""
        return self.tokens if self.model_type == "gpt2" else round(0.15 * self.tokens)

    @property
    def slots(self) -> int:
        """Room for supervised positions in a row of kd_jax's batch: P of kd_jax.types."""
        return math.ceil(math.ceil(0.15 * self.tokens) / 8) * 8

    def hf_config(self, layers: int, dropout: float) -> dict:
        """config.json of a model of this case with `layers` layers."""
        if self.model_type == "gpt2":
            return {
                "model_type": "gpt2",
                "architectures": ["GPT2LMHeadModel"],
                "vocab_size": self.vocab_size,
                "n_embd": self.width,
                "n_layer": layers,
                "n_head": self.heads,
                "n_positions": 1024,
                "resid_pdrop": dropout,
                "embd_pdrop": dropout,
                "attn_pdrop": dropout,
                "bos_token_id": self.vocab_size - 1,
                "eos_token_id": self.vocab_size - 1,
            }
        return {
            "model_type": "bert",
            "architectures": ["BertForMaskedLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": 512,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        }

    def batch(self) -> dict[str, np.ndarray]:
        """tokens_BT, positions (B, masked) in ascending order, labels like positions; no padding.

        Random tokens: the time of a step does not depend on them.
        """
        random = np.random.default_rng(0)
        tokens_BT = random.integers(0, self.vocab_size, (self.rows, self.tokens), dtype=np.int32)
        if self.model_type == "gpt2":
            positions = np.broadcast_to(np.arange(self.tokens, dtype=np.int32), tokens_BT.shape)
        else:
            shuffled = random.permuted(np.tile(np.arange(self.tokens), (self.rows, 1)), axis=1)
            positions = np.sort(shuffled[:, : self.masked], axis=1).astype(np.int32)
        labels = random.integers(0, self.vocab_size, positions.shape, dtype=np.int32)
        return {"tokens_BT": tokens_BT, "positions": positions, "labels": labels}

    def flops(self) -> float:
        """Matrix products one step needs: the teacher forward, the student three times that, heads
        at the supervised positions only."""
        body = 24 * self.width**2 + 4 * self.tokens * self.width  # a layer and token
        head = 2 * self.width * self.vocab_size
        if self.model_type == "bert":
            head += 2 * self.width**2
        layers = self.teacher_layers + 3 * self.student_layers
        return self.rows * (self.tokens * body * layers + self.masked * head * (1 + 3))


CASES = {
    "clm": Case("clm", "gpt2", 50_257, 384, 6, 6, 3, rows=8, tokens=256),
    "mlm": Case("mlm", "bert", 30_522, 384, 6, 6, 3, rows=16, tokens=128),
    # GPT-2 to DistilGPT-2, and BERT-base to six of its layers.
    "clm-base": Case("clm-base", "gpt2", 50_257, 768, 12, 12, 6, rows=16, tokens=1024),
    "mlm-base": Case("mlm-base", "bert", 30_522, 768, 12, 12, 6, rows=64, tokens=512),
}
ON = {"cpu": ("clm", "mlm"), "gpu": ("clm-base", "mlm-base")}  # what is timed where
TINY = {
    "clm": Case("clm", "gpt2", 500, 32, 2, 2, 1, rows=4, tokens=32),
    "mlm": Case("mlm", "bert", 500, 32, 2, 2, 1, rows=4, tokens=32),
}
TINY |= {"clm-base": TINY["clm"], "mlm-base": TINY["mlm"]}
