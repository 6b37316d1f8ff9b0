"""Log-likelihoods of stretches of text, from what a language model returns, without the logits of
all tokens: only the tokens that predict a scored one go through the unembedding, in chunks."""

import jax
import jax.numpy as jnp

from kd_jax.precision import exact
from kd_jax.types import Array, Batch, ModelOutput

LOGITS = 2**22  # of a chunk: 16 MB
ROWS = 128, 1024  # of a chunk, at least and at most


def of_segments(output: ModelOutput, batch: Batch, segments: int, operand: str) -> Array:
    """Sums of log p(label) in nats over the tokens of weight 1, float32, (B, K).

    Column k is that of segment k + 1 of `batch.segments_BT`, K = `segments`; without segments there
    is one column. `operand` is the type of the product that makes logits; they are float32.
    """
    B, T = batch.tokens_BT.shape
    features_ND = output.features.reshape(B * T, -1).astype(operand)
    unembed_VD = output.unembed_VD.astype(operand)
    size = min(B * T, max(ROWS[0], min(ROWS[1], LOGITS // unembed_VD.shape[0])))
    scored_N = batch.weights.reshape(-1) > 0
    count = scored_N.sum()
    # Numbers of the scored tokens, those of no token behind them, in whole chunks.
    room = -(-B * T // size) * size
    order_R = jnp.nonzero(scored_N, size=room, fill_value=B * T)[0]
    labels_N = batch.labels.reshape(-1)

    def chunk(i: Array, found_N: Array) -> Array:
        rows_C = jax.lax.dynamic_slice(order_R, (i * size,), (size,))
        logits_CV = jnp.einsum(
            "cd,vd->cv",
            features_ND.at[rows_C].get(mode="clip"),
            unembed_VD,
            precision=exact(operand),
            preferred_element_type=jnp.float32,
        )
        if output.bias_V is not None:
            logits_CV += output.bias_V.astype(jnp.float32)[None]
        labels_C1 = labels_N.at[rows_C].get(mode="clip")[:, None]
        label_C = jnp.take_along_axis(logits_CV, labels_C1, axis=1)[:, 0]
        log_p_C = label_C - jax.nn.logsumexp(logits_CV, axis=1)
        return found_N.at[rows_C].set(log_p_C, mode="drop")

    zeros_N = jnp.zeros(B * T, jnp.float32)
    log_p_BT = jax.lax.fori_loop(0, -(-count // size), chunk, zeros_N).reshape(B, T)
    if batch.segments_BT is None:
        return log_p_BT.sum(axis=1, keepdims=True)
    own = [batch.segments_BT == number for number in range(1, segments + 1)]
    return jnp.stack([jnp.where(own_BT, log_p_BT, 0.0).sum(axis=1) for own_BT in own], axis=1)
