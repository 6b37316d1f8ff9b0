"""How near a model's answers are to its teacher's."""

from collections.abc import Sequence

import numpy as np
from scipy import special


def beside_teacher(
    student: Sequence[np.ndarray], teacher: Sequence[np.ndarray]
) -> dict[str, float]:
    """{"kl", "agreement"}: KL(teacher || student) at temperature 1, nats an answer, and the share
    of answers where both have the same first choice.

    Each row's logits are (C,), or (P, C) for P answers, which count alike.
    """
    if student[0].ndim == 1:  # all of them at once
        student, teacher = [np.stack(student)], [np.stack(teacher)]
    divergence = agreed = count = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        pair = (np.asarray(logits, np.float64) for logits in (ours, theirs))
        log_p, log_q = (special.log_softmax(logits, axis=-1) for logits in pair)
        divergence += float(np.sum(np.exp(log_q) * (log_q - log_p)))
        agreed += float(np.sum(log_p.argmax(-1) == log_q.argmax(-1)))
        count += len(log_p)
    return {"kl": divergence / count, "agreement": agreed / count}
