"""Computes all row-wise divergences over a vocabulary in one pass that never holds all logits.

Rows are processed in chunks. For each chunk the logits of student and teacher are computed, every
divergence is evaluated, and, if a gradient is wanted, its gradient with respect to the logits is
immediately backpropagated to the features and the unembedding. The logits of all rows, and their
gradients, never exist: the peak is a few (C, V) arrays instead of (N, V). Computing gradients in
the forward pass is the idea of fused linear cross-entropy (Hsu et al., "Liger Kernel",
arXiv:2410.10989, section 3.2).

Inside `shard_map` each device calls this for its own rows. Where it holds only a part of the
unembedding (`axes.VOCAB`), the devices that share one gather their chunks' features: each computes
its part of all their rows' logits, sums over the vocabulary are summed over devices, and gradients
of features go back to whose they are. None ever holds the unembedding, or its gradient, whole.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kd_jax import axes
from kd_jax.objectives.divergence import Divergence, Rows, Softmax, Sums
from kd_jax.objectives.logits import Head, Mixture, Others, Source, in_chunks
from kd_jax.precision import Policy
from kd_jax.types import Array

ROW_LOGITS = 2**25  # logits of one chunk where the configuration sets no chunk size: 128 MB
TILE = 128  # rows that accelerators multiply at a time


@dataclasses.dataclass(frozen=True)
class RowTerm:
    """Holds a divergence and the name under which it is logged; `temperature` None: it is traced.

    Terms that read the teacher compare distributions over the ids that all models of the run share
    (the first ones), renormalized. Other terms use all ids of their model.

    `of`: which logits it uses if the student is mixed with others, "student" or "mixture". None:
    the mixture if it reads the teacher, else the student.
    """

    name: str
    divergence: Divergence
    temperature: float | None = 1.0
    of: str | None = None
    positions: str = "supervised"  # that it sees; or all: every token but padding
    selection: object = None  # objectives/selection.py: a share of them, by entropy

    def subject(self, mixture: Mixture | None) -> str:
        """Tells which logits the term uses: "student" or "mixture"."""
        if mixture is None:
            return "student"
        return self.of or ("mixture" if self.divergence.needs_teacher else "student")


@dataclasses.dataclass(frozen=True)
class Engine:
    """Holds the engine's static settings: terms, chunk size in rows (0: automatic), types."""

    terms: tuple[RowTerm, ...]
    student_policy: Policy
    teacher_policy: Policy | None
    chunk: int = 0

    def rows_per_chunk(self, num_rows: int, vocab_size: int) -> int:
        """Computes the rows of a chunk: as configured, or equal chunks of ROW_LOGITS logits; on an
        accelerator at least as many rows as a product needs to be fast, in multiples of TILE."""
        least = self.student_policy.least_rows
        chunk = min(self.chunk or max(least, ROW_LOGITS // vocab_size), num_rows)
        if self.chunk or least < TILE:
            num_chunks = -(-num_rows // chunk)
            return -(-num_rows // num_chunks)
        size = -(-num_rows // (num_rows // chunk))
        return size if size == num_rows else -(-size // TILE) * TILE


def _seen(
    terms, logits: dict[str, Array], sizes: dict[str, int], columns, given, temperatures, mixture
) -> tuple[list, Sums]:
    """Prepares each term's (term, subject, rows, temperature), where rows have only the ids that it
    compares, and computes all sums over the vocabulary; `logits` and `sizes` are by model, `given`
    are the rows' labels and, if known, their log-probabilities when they were written."""
    shared = min(sizes.values())
    if columns.start is not None:  # parts have padding
        logits = {name: columns.below(x_CV, sizes[name]) for name, x_CV in logits.items()}
    logits = logits | {
        f"shared {name}": columns.below(logits_CV, shared)
        for name, logits_CV in logits.items()
        if sizes[name] > shared
    }
    maxima = columns.reduced(logits, jax.lax.max)
    temps = [
        temperatures[term.name] if term.temperature is None else term.temperature for term in terms
    ]
    powers = frozenset(int(t) for t in temps if isinstance(t, float) and t.is_integer())
    softmax = {
        name: Softmax(name, x_CV, maxima[name], powers, columns) for name, x_CV in logits.items()
    }
    seen, arrays = [], {}
    for term, temperature in zip(terms, temps, strict=True):
        subject = term.subject(mixture)
        labels_C, written_C = given
        rows = Rows(softmax[subject], None, labels_C)
        if term.divergence.needs_teacher:
            pair = (softmax.get(f"shared {name}", softmax[name]) for name in (subject, "teacher"))
            rows = Rows(*pair, labels_C, softmax["teacher"], shared, written_C)
        seen.append((term, subject, rows, temperature))
        arrays |= term.divergence.sums(rows, temperature)
    return seen, columns.reduced(arrays, jax.lax.add)


def _widened(slope_CV: Array, width: int) -> Array:
    """Pads a gradient with zeros for ids that a term does not compare."""
    missing = width - slope_CV.shape[1]
    return jnp.pad(slope_CV, ((0, 0), (0, missing))) if missing else slope_CV


def _cast(source: Source | None, policy: Policy | None) -> Source | None:
    """Casts an unembedding to the type that products multiply: once, not in every chunk."""
    if not isinstance(source, Head) or source.unembed_VD is None:
        return source
    return source.replace(unembed_VD=source.unembed_VD.astype(jnp.dtype(policy.operand)))


def _run(
    engine, student, teacher, labels_N, weights, scales, temperatures, others, written_N, want_grads
):
    """Computes the loss, totals by term, and optionally the gradients of the student's head."""
    student = _cast(student, engine.student_policy)
    teacher = _cast(teacher, engine.teacher_policy)
    split = axes.FSDP if student.part else ()  # the devices that share the unembedding's parts
    devices = axes.size(split)
    columns = student.columns(engine.student_policy)
    sources = {"student": student, "teacher": teacher}
    sizes = {name: each.num_classes for name, each in sources.items() if each is not None}

    def add_chunk(carry, chunk):
        rows, given, weights_C = jax.tree.map(lambda x: axes.gathered(x, split), chunk)
        student_rows, teacher_rows, other_rows = rows
        totals, head_slopes = carry
        logits = {"student": student.logits(student_rows, engine.student_policy)}
        mixture, widths = None, dict(sizes)
        if teacher is not None:
            own_CV = logits["student"]
            logits["teacher"] = teacher.logits(teacher_rows, engine.teacher_policy, own_CV)
        if others is not None:
            mixture = others.mixture(logits["student"], other_rows, engine.teacher_policy)
            logits["mixture"] = mixture.logits_CV
            widths["mixture"] = mixture.logits_CV.shape[1]
        seen, sums = _seen(engine.terms, logits, widths, columns, given, temperatures, mixture)
        totals = dict(totals)
        slopes = {name: jnp.zeros_like(logits_CV) for name, logits_CV in logits.items()}
        for term, subject, rows, temperature in seen:
            weight_C1 = weights_C[term.name][:, None]
            value_C1 = term.divergence.value(rows, sums, temperature)
            # A row of weight 0 may hold anything, and 0 times infinity is no number.
            weighed_C1 = jnp.where(weight_C1 > 0, weight_C1 * value_C1, 0.0)
            totals[term.name] += jnp.sum(axes.own(weighed_C1, split))
            if want_grads and term.name in scales:
                slope_CV = scales[term.name] * term.divergence.grad(rows, sums, temperature)
                slope_CV = jnp.where(weight_C1 > 0, weight_C1 * slope_CV, 0.0)
                slopes[subject] += _widened(slope_CV, slopes[subject].shape[1])
        if not want_grads:
            return (totals, head_slopes), None
        slope_CV = slopes["student"]
        if mixture is not None:
            slope_CV += _widened(mixture.pulled_back(slopes["mixture"]), student.num_classes)
        dx_CD, *of_head = student.pulled_back(student_rows, slope_CV, engine.student_policy)
        if student.part:
            dx_CD = axes.scattered(axes.total(dx_CD, (axes.MODEL,)), split)
        head_slopes = jax.tree.map(jnp.add, head_slopes, of_head)
        return (totals, head_slopes), dx_CD.astype(student_rows.dtype)

    num_rows = len(labels_N)
    width = student.part or student.num_classes
    size = -(-engine.rows_per_chunk(num_rows * devices, width) // devices)
    rows = tuple(None if x is None else x.rows for x in (student, teacher, others))
    zeros = {term.name: jnp.float32(0.0) for term in engine.terms}
    none_yet = [  # the unembedding's, transposed, and the bias's
        None if x is None or not want_grads else jnp.zeros(x.shape[::-1], jnp.float32)
        for x in (student.unembed_VD, student.bias_V)
    ]
    chunks = in_chunks((rows, (labels_N, written_N), weights), size)
    (totals, (dw_DV, db_V)), dx = jax.lax.scan(add_chunk, (zeros, none_yet), chunks)
    loss = sum((scales[name] * totals[name] for name in scales), jnp.float32(0.0))
    if not want_grads:
        return loss, totals, None
    if dw_DV is not None:
        # The barrier keeps XLA from folding the transposition into the last chunk's product.
        dw_DV = jax.lax.optimization_barrier(dw_DV).T
    dx_ND = dx.reshape(-1, dx.shape[-1])[:num_rows]
    return loss, totals, student.replace(features_ND=dx_ND, unembed_VD=dw_DV, bias_V=db_V)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def vocab_loss(
    engine: Engine,
    student: Head,
    teacher: Source | None,
    labels_N: Array,
    weights: dict[str, Array],
    scales: dict[str, Array],
    temperatures: dict[str, Array],
    others: Others | None = None,
    written_N: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Computes every term of `engine` over N rows.

    Args:
        engine: the static part.
        student: features (N, D), unembedding (V, D), bias (V,) or None; gradients go here only.
        teacher: the same of the teacher (its own width and V), or None. Any source will do.
        labels_N: int32; float32 for a regression.
        weights: for each term a float32 weight a row, (N,).
        scales: for each trained term, its coefficient over its global denominator; terms without a
            scale are only logged.
        temperatures: float32 scalars of the terms whose temperature is traced.
        others: models whose mean with the student replaces it in all terms that read the teacher;
            None: the student alone.
        written_N: the labels' log-probabilities under the model that wrote them, where one did.

    Returns:
        (loss, totals): the sum of scale x total, and each term's weighted sum over the rows, in
        nats where the term is a divergence. Totals carry no gradient.
    """
    given = student, teacher, labels_N, weights, scales, temperatures, others, written_N
    return _run(engine, *given, want_grads=False)[:2]


def _vocab_loss_fwd(engine, *given):
    student, scales = given[0], given[4]
    loss, totals, grads = _run(engine, *given, want_grads=bool(scales))
    if not scales:  # everything is measured only
        grads = jax.tree.map(jnp.zeros_like, student)
    # Empty arrays remember the types that the gradients have to come back in.
    like = jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), student)
    return (loss, totals), (grads, like)


def _vocab_loss_bwd(engine, residual, cotangents):
    grads, like = residual
    g, _ = cotangents
    student = jax.tree.map(lambda d, x: (g * d).astype(x.dtype), grads, like)
    return student, *[None] * 7


vocab_loss.defvjp(_vocab_loss_fwd, _vocab_loss_bwd)
