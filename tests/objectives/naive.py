"""The row-wise divergences again, from their definitions, in NumPy's float64."""

import numpy as np


def softmax(logits_CV: np.ndarray, temperature: float) -> np.ndarray:
    shifted_CV = (logits_CV - logits_CV.max(-1, keepdims=True)) / temperature
    return np.exp(shifted_CV) / np.exp(shifted_CV).sum(-1, keepdims=True)


def _log(p_CV):
    return np.log(np.maximum(p_CV, 1e-300))


def _kl(p_CV, q_CV):
    return (p_CV * (_log(p_CV) - _log(q_CV))).sum(-1)


def _jsd(p, q, beta, scaled=True):
    if beta in (0.0, 1.0):
        return _kl(q, p) if beta == 0.0 else _kl(p, q)
    m = beta * q + (1 - beta) * p
    total = beta * _kl(q, m) + (1 - beta) * _kl(p, m)
    return total / (beta * (1 - beta)) if scaled else total


def _akl(p, q, head=0.5, held=None):
    """`held`: the student by which the two are weighed; None: p."""
    order = np.argsort(-q, axis=-1, kind="stable")
    sorted_q = np.take_along_axis(q, order, -1)
    in_head = np.cumsum(sorted_q, -1) <= head
    in_head[:, 0] = True
    gaps = np.take_along_axis(np.abs((p if held is None else held) - q), order, -1)
    whole = gaps.sum(-1)
    share = np.divide((gaps * in_head).sum(-1), whole, np.full(len(p), 0.5), where=whole > 0)
    return share * _kl(q, p) + (1 - share) * _kl(p, q)


# Of p = softmax(student / T), q = softmax(teacher / T); all but `scaled` and so on in make().
_SOFTENED = {
    "kl": lambda p, q: _kl(q, p),
    "reverse_kl": lambda p, q: _kl(p, q),
    "jsd": lambda p, q, beta=0.5, scaled=True: _jsd(p, q, beta, scaled),
    "tvd": lambda p, q: 0.5 * np.abs(p - q).sum(-1),
    "skl": lambda p, q, alpha=0.1: _kl(q, alpha * q + (1 - alpha) * p),
    "srkl": lambda p, q, alpha=0.1: _kl(p, (1 - alpha) * q + alpha * p),
    "symmetric_kl": lambda p, q, forward=0.5: forward * _kl(q, p) + (1 - forward) * _kl(p, q),
    "akl": _akl,
}


def _log_prob(logits_CV, label):
    return _log(softmax(logits_CV, 1.0))[np.arange(len(logits_CV)), label]


def _policy_gradient(s, t, label, old=None):
    """`old`: log-probabilities of the labels when they were written; None: now."""
    own = _log_prob(s, label)
    old = own if old is None else old
    return np.exp(own - old) * (old - _log_prob(t, label))


_PLAIN = {
    "ce": lambda s, t, label: -_log_prob(s, label),
    "policy_gradient": _policy_gradient,
    "logit_mse": lambda s, t, label: np.square(s - t).sum(-1),
}
NAMES = sorted({*_SOFTENED, *_PLAIN})


def value(name, student_CV, teacher_CV, labels_C, temperature=1.0, t_squared=True, **settings):
    """The divergence of each row, (C,)."""
    if name in _PLAIN:
        return _PLAIN[name](student_CV, teacher_CV, labels_C, **settings)
    p_CV, q_CV = (softmax(logits, temperature) for logits in (student_CV, teacher_CV))
    factor = temperature**2 if t_squared else 1.0
    return factor * _SOFTENED[name](p_CV, q_CV, **settings)


def constants(name, student_CV, temperature):
    """Settings of `value` that hold what no gradient goes through: the weights of akl."""
    return {"held": softmax(student_CV, temperature)} if name == "akl" else {}


def grad(name, student_CV, *args, step: float = 1e-5, **settings):
    """d value / d student logits by central differences, (C, V)."""
    settings |= constants(name, student_CV, args[2])
    found = np.zeros_like(student_CV)
    if name == "policy_gradient":
        settings = {"old": _log_prob(student_CV, args[1])} | settings
    for v in range(student_CV.shape[1]):
        nudge_V = step * np.eye(student_CV.shape[1])[v]
        above = value(name, student_CV + nudge_V, *args, **settings)
        below = value(name, student_CV - nudge_V, *args, **settings)
        found[:, v] = (above - below) / (2 * step)
    return found
