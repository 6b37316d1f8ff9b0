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

import jax
import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.objectives import chunks
from kd_jax.objectives.rows import Divergence, Rows, Softmax, Sums
from kd_jax.objectives.sources import Beside, Guidance, Head, Mixed, Source, head_of
from kd_jax.precision import Policy, rows_product
from kd_jax.types import Array, ModelOutput

PADDING = -1e8  # span heads give padding less than this, -1e9
ROW_LOGITS = 2**25  # logits of one chunk where the configuration sets no chunk size: 128 MB


def shared_sources(
    student: ModelOutput, teacher: ModelOutput | Guidance | None
) -> tuple[Head, Source | None, Beside | None]:
    """The logits of student, teacher and others beside the student, over the ids they share."""
    if not isinstance(teacher, Guidance):
        return *shared_heads(student, teacher), None
    guides, beside = jax.lax.stop_gradient((teacher.teacher, teacher.beside))
    own = head_of(student)
    sources = [own, guides] + ([] if beside is None else [beside.others])
    shared = min(source.num_classes for source in sources)
    own, guides, *others = (source.cut(shared) for source in sources)
    return own, guides, beside and beside.replace(others=others[0])


def shared_heads(student: ModelOutput, teacher: ModelOutput | None) -> tuple[Head, Head | None]:
    """The heads of two models over the ids they share.

    Vocabularies of one tokenizer that differ in padding rows only are cut to the shorter one, so
    that both softmaxes run over the same ids. Classes are no such thing: raises UserError where two
    heads that give logits outright differ in their number.
    """
    outputs = [student] if teacher is None else [student, jax.lax.stop_gradient(teacher)]
    heads = [head_of(output) for output in outputs]
    sizes = [head.num_classes for head in heads]
    if len(set(sizes)) > 1 and all(head.unembed_VD is None for head in heads):
        raise UserError(
            f"the student's head gives {sizes[0]} logits a row and the teacher's {sizes[1]}: both "
            "need the same classes (or tokens)"
        )
    heads = [head.cut(min(sizes)) for head in heads]
    if teacher is None:
        return heads[0], None
    ours, theirs = heads
    if ours.unembed_VD is None and theirs.unembed_VD is None:
        fixed_ND = jax.lax.stop_gradient(ours.features_ND)
        theirs_ND = jnp.where(fixed_ND < PADDING, fixed_ND, theirs.features_ND)
        theirs = theirs.replace(features_ND=theirs_ND)
    return ours, theirs


@dataclasses.dataclass(frozen=True)
class RowTerm:
    """A divergence under the name it is logged by. `temperature` None means a traced one.

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


def _max_over_vocabulary(logits: list[Array]) -> list[Array]:
    """Each row's largest logit of every model, (C, V) -> (C, 1), in one pass.

    Apart, XLA's CPU backend would fold each into the product that makes the logits and halve that
    product's speed.
    """
    lowest = tuple(jnp.float32(-jnp.inf) for _ in logits)
    larger = lambda left, right: tuple(map(jnp.maximum, left, right))  # noqa: E731
    return [m[:, None] for m in jax.lax.reduce(tuple(logits), lowest, larger, (1,))]


def _sum_over_vocabulary(arrays: Sums) -> Sums:
    """All sums in one pass over the chunk: (C, V) -> (C, 1)."""
    zeros = tuple(jnp.float32(0.0) for _ in arrays)
    add = lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True))  # noqa: E731
    totals = jax.lax.reduce(tuple(arrays.values()), zeros, add, (1,))
    return {key: total[:, None] for key, total in zip(arrays, totals, strict=True)}


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
        others_CV = beside.others.logits(z, engine.teacher_policy)
        mixed = Mixed(logits["student"], others_CV, beside.share, beside.space)
        logits["mixture"] = mixed.logits_CV
    maxima = _max_over_vocabulary(list(logits.values()))
    found = {
        name: Softmax(name, logits_CV, max_C1, powers)
        for (name, logits_CV), max_C1 in zip(logits.items(), maxima, strict=True)
    }
    own = Rows(found["student"], found.get("teacher"), labels_C)
    whole = own if mixed is None else Rows(found["mixture"], found.get("teacher"), labels_C)
    seen = [whole if term.about == "mixture" else own for term in engine.terms]
    arrays: dict[Hashable, Array] = {}
    for term, rows, temperature in zip(engine.terms, seen, temps, strict=True):
        arrays |= term.divergence.sums(rows, temperature)
    return seen, temps, _sum_over_vocabulary(arrays), mixed


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
                if rows.student.name == "mixture":
                    dm_CV += slope_CV
                else:
                    ds_CV += slope_CV
        if mixed is not None and want_grads:
            ds_CV += mixed.pulled_back(jnp.broadcast_to(dm_CV, mixed.own_CV.shape))
        dx_CD = None
        if want_grads and unembed_VD is None:
            dx_CD = jnp.broadcast_to(ds_CV, x_CD.shape).astype(x_CD.dtype)
        elif want_grads:
            ds_CV = ds_CV.astype(operand)
            dx_CD = jnp.einsum(
                "cv,vd->cd", ds_CV, unembed_VD, preferred_element_type=jnp.float32
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
    inputs = chunks.split((of_sources, labels_N, weights), size)
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
    """Every term of `engine` over N rows.

    Args:
        engine: the static part.
        student: features (N, D), unembedding (V, D), bias (V,) or None; gradients go here only.
        teacher: the same of the teacher (its own width), or None; the same V. Any source will do.
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


def _vocab_loss_fwd(engine, student, teacher, labels_N, weights, scales, temperatures, beside=None):
    given = student, teacher, labels_N, weights, scales, temperatures, beside
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
