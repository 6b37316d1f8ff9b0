"""The vocabulary engine: all row-wise divergences of a run in one pass that never holds the logits.

Rows go through in chunks. For each chunk the logits of student and teacher are formed, every
divergence is evaluated, and, when a gradient is wanted, its gradient with respect to the logits is
pulled back to the features and the unembedding at once. Neither logits nor their gradients of all
rows ever exist: the peak is a few (C, V) arrays instead of (N, V). Computing gradients in the
forward pass is the idea of fused linear cross-entropy (Hsu et al., "Liger Kernel",
arXiv:2410.10989, section 3.2).

Inside `shard_map` each device calls this for its own rows; nothing here communicates.
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.objectives.divergence import Divergence, Rows, Softmax, Sums
from kd_jax.objectives.logits import Beside, Guidance, Head, Mixed, Source, head_of, in_chunks
from kd_jax.precision import Policy, exact, rows_product
from kd_jax.types import Array, ModelOutput

PADDING = -1e8  # span heads give padding less than this, -1e9
ROW_LOGITS = 2**25  # logits of one chunk where the configuration sets no chunk size: 128 MB


def sources_of(
    student: ModelOutput, teacher: ModelOutput | Guidance | None
) -> tuple[Head, Source | None, Beside | None]:
    """Finds the logits of student, teacher and other members, each over all of its ids.

    Classes are no vocabulary, of which a part may be compared: raises UserError where two heads
    that give logits outright differ in their number.
    """
    ours = head_of(student)
    if teacher is None:
        return ours, None, None
    if isinstance(teacher, Guidance):
        return ours, *jax.lax.stop_gradient((teacher.teacher, teacher.beside))
    theirs = head_of(jax.lax.stop_gradient(teacher))
    if ours.unembed_VD is None and theirs.unembed_VD is None:
        if ours.num_classes != theirs.num_classes:
            raise UserError(
                f"the student's head gives {ours.num_classes} logits a row and the teacher's "
                f"{theirs.num_classes}: both need the same classes (or tokens)"
            )
        fixed_ND = jax.lax.stop_gradient(ours.features_ND)
        theirs_ND = jnp.where(fixed_ND < PADDING, fixed_ND, theirs.features_ND)
        theirs = theirs.replace(features_ND=theirs_ND)
    return ours, theirs, None


@dataclasses.dataclass(frozen=True)
class RowTerm:
    """A divergence under the name it is logged by. `temperature` None means a traced one.

    What reads the teacher compares: over the ids that all models of the run share, the first ones,
    each model's distribution renormalised. All else is over every id of the model it is about.

    `of`: whose logits it is about where others stand beside the student, "student" or "mixture".
    None: the mixture where it reads the teacher, else the student.
    """

    name: str
    divergence: Divergence
    temperature: float | None = 1.0
    of: str | None = None

    @property
    def about(self) -> str:
        """student | mixture, see above."""
        return self.of or ("mixture" if self.divergence.needs_teacher else "student")


@dataclasses.dataclass(frozen=True)
class Engine:
    """What is static: the terms, the chunk size in rows (0: by size), each model's types."""

    terms: tuple[RowTerm, ...]
    student_policy: Policy
    teacher_policy: Policy | None
    chunk: int = 0

    def rows_per_chunk(self, num_rows: int, vocab_size: int) -> int:
        """Rows of a chunk: as configured, or as many as fill ROW_LOGITS, in equal chunks."""
        chunk = self.chunk or max(8, ROW_LOGITS // vocab_size)
        num_chunks = -(-num_rows // min(chunk, num_rows))
        return -(-num_rows // num_chunks)


def _over_vocabulary(arrays: dict[Hashable, Array], first: float, join: Any) -> Sums:
    """Each array's rows joined, (C, V) -> (C, 1), in one pass over all arrays of one width.

    Apart, XLA's CPU backend would fold a maximum into the product that makes the logits and halve
    that product's speed.
    """
    widths = dict.fromkeys(array.shape[1] for array in arrays.values())
    found = {}
    for width in widths:
        group = {key: array for key, array in arrays.items() if array.shape[1] == width}
        starts = tuple(jnp.float32(first) for _ in group)
        both = lambda left, right: tuple(map(join, left, right))  # noqa: E731
        rows = jax.lax.reduce(tuple(group.values()), starts, both, (1,))
        found |= {key: row_C[:, None] for key, row_C in zip(group, rows, strict=True)}
    return found


def _chunk(engine, sources, inputs, labels_C, temperatures):
    """The chunk as every term sees it, the temperature of every term, the sums that they need, and
    the mixture if there is one."""
    temps = [
        temperatures[term.name] if term.temperature is None else term.temperature
        for term in engine.terms
    ]
    powers = frozenset(int(t) for t in temps if isinstance(t, float) and t.is_integer())
    student, teacher, beside = sources
    x_CD, y, z = inputs
    logits, mixed = {"student": student.logits(x_CD, engine.student_policy)}, None
    if teacher is not None:
        logits["teacher"] = teacher.logits(y, engine.teacher_policy)
    if beside is not None:
        own_CV, others_CV = logits["student"], beside.others.logits(z, engine.teacher_policy)
        both = min(own_CV.shape[1], others_CV.shape[1])
        mixed = Mixed(own_CV[:, :both], others_CV[:, :both], beside.share, beside.space)
        logits["mixture"] = mixed.logits_CV
    shared = min(logits_CV.shape[1] for logits_CV in logits.values())
    for name, logits_CV in list(logits.items()):
        if logits_CV.shape[1] > shared:
            logits["shared " + name] = logits_CV[:, :shared]
    maxima = _over_vocabulary(logits, -jnp.inf, jax.lax.max)
    found = {
        name: Softmax(name, logits_CV, maxima[name], powers) for name, logits_CV in logits.items()
    }

    def seen_by(term: RowTerm) -> Rows:
        name = "student" if mixed is None else term.about
        if not term.divergence.needs_teacher:
            return Rows(found[name], None, labels_C)
        whole = found["teacher"]
        ours, theirs = (found.get("shared " + each, found[each]) for each in (name, "teacher"))
        return Rows(ours, theirs, labels_C, whole)

    seen = [seen_by(term) for term in engine.terms]
    arrays: dict[Hashable, Array] = {}
    for term, rows, temperature in zip(engine.terms, seen, temps, strict=True):
        arrays |= term.divergence.sums(rows, temperature)
    return seen, temps, _over_vocabulary(arrays, 0.0, jax.lax.add), mixed


def _widened(slope_CV: Array, width: int) -> Array:
    """With zeros for the ids that a term does not see."""
    missing = width - slope_CV.shape[1]
    return jnp.pad(slope_CV, ((0, 0), (0, missing))) if missing else slope_CV


def _run(engine, student, teacher, labels_N, weights, scales, temperatures, beside, want_grads):
    """Loss, totals by term, and the gradients for (features, unembedding, bias) when wanted."""
    num_rows = labels_N.shape[0]
    size = engine.rows_per_chunk(num_rows, student.num_classes)
    operand = jnp.dtype(engine.student_policy.operand)
    unembed_VD = student.unembed_VD
    if unembed_VD is not None:
        unembed_VD = unembed_VD.astype(operand)  # once, not in every chunk
    sources = student.replace(unembed_VD=unembed_VD), teacher, beside

    def body(carry, inputs):
        of_sources, labels_C, weights_C = inputs
        x_CD = of_sources[0]
        totals, dw_DV, db_V = carry
        seen, temps, sums, mixed = _chunk(engine, sources, of_sources, labels_C, temperatures)
        ds_CV = dm_CV = 0.0
        totals = dict(totals)
        for term, rows, temperature in zip(engine.terms, seen, temps, strict=True):
            weight_C1 = weights_C[term.name][:, None]
            value_C1 = term.divergence.value(rows, sums, temperature)
            # A row of weight 0 may hold anything, and 0 times infinity is no number.
            totals[term.name] += jnp.sum(jnp.where(weight_C1 > 0, weight_C1 * value_C1, 0.0))
            if want_grads and term.name in scales:
                slope_CV = scales[term.name] * term.divergence.grad(rows, sums, temperature)
                slope_CV = jnp.where(weight_C1 > 0, weight_C1 * slope_CV, 0.0)
                if mixed is not None and term.about == "mixture":
                    dm_CV += _widened(slope_CV, mixed.own_CV.shape[1])
                else:
                    ds_CV += _widened(slope_CV, student.num_classes)
        if mixed is not None and want_grads:
            pulled_CV = mixed.pulled_back(jnp.broadcast_to(dm_CV, mixed.own_CV.shape))
            ds_CV += _widened(pulled_CV, student.num_classes)
        dx_CD = None
        if want_grads and unembed_VD is None:
            dx_CD = jnp.broadcast_to(ds_CV, x_CD.shape).astype(x_CD.dtype)
        elif want_grads:
            ds_CV = ds_CV.astype(operand)
            dx_CD = jnp.einsum(
                "cv,vd->cd",
                ds_CV,
                unembed_VD,
                precision=exact(operand),
                preferred_element_type=jnp.float32,
            ).astype(x_CD.dtype)
            dw_DV += rows_product(x_CD, ds_CV, engine.student_policy)
            if db_V is not None:
                db_V += jnp.sum(ds_CV, axis=0, dtype=jnp.float32)
        return (totals, dw_DV, db_V), dx_CD

    zeros = {term.name: jnp.float32(0.0) for term in engine.terms}
    dw_DV = db_V = None
    if want_grads and unembed_VD is not None:
        dw_DV = jnp.zeros(unembed_VD.shape[::-1], jnp.float32)
    if want_grads and student.bias_V is not None:
        db_V = jnp.zeros(student.bias_V.shape, jnp.float32)
    of_sources = (
        student.rows,
        None if teacher is None else teacher.rows,
        None if beside is None else beside.others.rows,
    )
    inputs = in_chunks((of_sources, labels_N, weights), size)
    (totals, dw_DV, db_V), dx = jax.lax.scan(body, (zeros, dw_DV, db_V), inputs)
    loss = sum((scales[name] * totals[name] for name in scales), jnp.float32(0.0))
    grads = None
    if want_grads:
        dx_ND = dx.reshape(-1, dx.shape[-1])[:num_rows]
        if dw_DV is not None:
            # The barrier keeps XLA from folding the transposition into the last chunk's product.
            dw_DV = jax.lax.optimization_barrier(dw_DV).T
        grads = Head(dx_ND, dw_DV, db_V)
    return loss, totals, grads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def vocab_loss(
    engine: Engine,
    student: Head,
    teacher: Source | None,
    labels_N: Array,
    weights: dict[str, Array],
    scales: dict[str, Array],
    temperatures: dict[str, Array],
    beside: Beside | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Computes every term of `engine` over N rows.

    Args:
        engine: the static part.
        student: features (N, D), unembedding (V, D), bias (V,) or None; gradients go here only.
        teacher: the same of the teacher (its own width and V), or None. Any source will do.
        labels_N: int32; float32 for a regression.
        weights: for each term a float32 weight a row, (N,).
        scales: for each term that is trained, its weight in the loss over its global denominator;
            terms without a scale are measured only.
        temperatures: float32 scalars of the terms whose temperature is traced.
        beside: others whose mean with the student takes its place in all terms that read the
            teacher; None: the student stands alone.

    Returns:
        (loss, totals): the sum of scale x total, and each term's weighted sum over the rows, in
        nats where the term is a divergence. Totals carry no gradient.
    """
    given = student, teacher, labels_N, weights, scales, temperatures, beside
    loss, totals, _ = _run(engine, *given, want_grads=False)
    return loss, totals


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
    return student, None, None, None, None, None, None


vocab_loss.defvjp(_vocab_loss_fwd, _vocab_loss_bwd)
