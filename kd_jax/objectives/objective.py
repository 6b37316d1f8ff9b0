"""Builds a run's objective: a weighted sum of terms, each a plug-in of this package.

The configuration maps names to settings, `{"ce": {"weight": 1.0}, "kl": {"weight": 1.0,
"temperature": 2.0}}`. The plug-in is the name's own unless `term` says another, so that one
plug-in may stand under two names.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.objectives import ce, kl, measures, vocab
from kd_jax.objectives.divergence import Divergence
from kd_jax.objectives.logits import Source, Targets, sources_of
from kd_jax.objectives.selection import BY, Selection, entropy
from kd_jax.objectives.vectors import VectorTerm
from kd_jax.precision import Policy
from kd_jax.ranges import Real
from kd_jax.schedules import Schedule, value_schedule
from kd_jax.types import Array, Batch, ModelOutput, ModelSpec, Params

WEIGHT = Real(least=0)
# Beyond 100 a KL is the difference of two sums that are equal but for rounding; below 0.01 its
# factor T^2 leaves nothing to learn.
TEMPERATURE = Real(least=0.01, most=100)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Computes a weighted sum of terms; this is its static part, with the models' types."""

    row_terms: tuple[vocab.RowTerm, ...]  # over logits
    state_terms: tuple[tuple[str, Any], ...]  # over hidden states and attention
    measured: tuple[vocab.RowTerm, ...]  # logged, not trained; at supervised positions
    student_policy: Policy
    teacher_policy: Policy | None
    chunk: int = 0
    vector_terms: tuple[tuple[str, VectorTerm], ...] = ()  # over the vectors of texts

    @property
    def names(self) -> list[str]:
        """Lists the trained terms, in the order of the configuration, row-wise ones first."""
        others = self.state_terms + self.vector_terms
        return [term.name for term in self.row_terms] + [name for name, _ in others]

    @property
    def needs_teacher(self) -> bool:
        """Tells whether any term, trained or measured, reads the teacher."""
        over_logits = [term.divergence for term in self.row_terms + self.measured]
        terms = over_logits + [term for _, term in self.vector_terms]
        return self.needs_teacher_states or any(term.needs_teacher for term in terms)

    @property
    def needs_teacher_states(self) -> bool:
        """Tells whether a term reads more than the teacher's logits or vectors, so that it must run
        in the step."""
        return any(term.needs_teacher for _, term in self.state_terms)

    @property
    def compares_rows(self) -> bool:
        """Tells whether a term compares texts of different examples of the global batch."""
        return any(term.compares_rows for _, term in self.vector_terms)

    def parts(self) -> tuple[Objective, Objective]:
        """Parts the terms into those that see an example at a time, and those that compare texts of
        different ones."""
        apart, across = (
            tuple(own for own in self.vector_terms if own[1].compares_rows == compares)
            for compares in (False, True)
        )
        none = dict(row_terms=(), state_terms=(), measured=())
        return (
            dataclasses.replace(self, vector_terms=apart),
            dataclasses.replace(self, vector_terms=across, **none),
        )

    @property
    def everywhere(self) -> tuple[str, ...]:
        """Lists the row-wise terms that read every token, not only supervised ones."""
        return tuple(term.name for term in self.row_terms if term.positions == "all")

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec | None) -> Params:
        """Draws the terms' own parameters (projections), by term name."""
        params = {}
        for i, (name, term) in enumerate(self.state_terms + self.vector_terms):
            own = term.init(jax.random.fold_in(key, i), student, teacher)
            if own:
                params[name] = own
        return params

    def fitted(self, params: Params, teacher_ND: Callable[[], np.ndarray]) -> Params:
        """Fits the terms' own parameters to vectors of the teacher, before the first step;
        `teacher_ND` computes these, and is called only where there is something to fit."""
        own = [(name, term) for name, term in self.vector_terms if name in params]
        return params | {name: term.fitted(params[name], teacher_ND) for name, term in own}

    def dense_labels(self, batch: Batch) -> Batch:
        """Converts a batch to labels at every token, if a row-wise term reads every token.

        Raises UserError if labels belong to rows instead of tokens.
        """
        if not self.everywhere:
            return batch
        batch = batch.dense()
        if batch.labels.shape != batch.tokens_BT.shape:
            raise UserError(
                f"objective.{self.everywhere[0]}.positions='all' is for language models: here a "
                f"row has {batch.labels.shape[1]} labels, not one for every token; leave "
                f"positions out"
            )
        return batch

    def _row_weights(self, batch: Batch) -> dict[str, Array]:
        """Lists the weights that each term would have everywhere, (B, P)."""
        seen = {"supervised": batch.weights, "all": batch.mask_BT}
        return {term.name: seen[term.positions] for term in self.row_terms + self.measured}

    def denominators(self, batch: Batch) -> dict[str, Array]:
        """Computes each term's denominator on this batch, from the data alone."""
        weights, totals = self._row_weights(batch), {}
        for term in self.row_terms + self.measured:
            own = jnp.sum if term.selection is None else term.selection.denominator
            totals[term.name] = own(weights[term.name])
        others = self.state_terms + self.vector_terms
        return totals | {name: jnp.sum(term.weights(batch)) for name, term in others}

    def _chosen(
        self, weights: dict[str, Array], engine: vocab.Engine, ours: Source, theirs: Source | None
    ) -> dict[str, Array]:
        """Leaves the weights of positions that a term has not selected by entropy at 0."""
        models = {"student_entropy": (ours, self.student_policy)}
        models["teacher_entropy"] = theirs, self.teacher_policy
        for term in self.row_terms:
            if term.selection is not None:
                source, policy = models[term.selection.by]
                num_rows = weights[term.name].size
                size = engine.rows_per_chunk(num_rows, source.num_classes)
                own_BP = entropy(source, policy, size).reshape(weights[term.name].shape)
                weights[term.name] = term.selection.weights(weights[term.name], own_BP)
        return weights

    def __call__(
        self,
        params: Params,
        student: ModelOutput,
        teacher: ModelOutput | Targets | None,
        batch: Batch,
        scales: dict[str, Array],
        temperatures: dict[str, Array],
    ) -> tuple[Array, dict[str, Array]]:
        """Computes (loss, totals): each term's weighted sum on this batch, and the loss, the sum of
        scale x total."""
        loss, totals = jnp.float32(0.0), {}
        if terms := self.row_terms + self.measured:
            ours, theirs, others = sources_of(student, teacher)
            if theirs is None or theirs.num_classes <= ours.num_classes:
                terms = tuple(term for term in terms if term is not measures.OUTSIDE)
            engine = vocab.Engine(terms, self.student_policy, self.teacher_policy, self.chunk)
            weights = self._chosen(self._row_weights(batch), engine, ours, theirs)
            loss, totals = vocab.vocab_loss(
                engine,
                ours,
                theirs,
                batch.labels.reshape(-1),
                {term.name: weights[term.name].reshape(-1) for term in terms},
                {term.name: scales[term.name] for term in self.row_terms},
                temperatures,
                others,
                None if batch.written is None else batch.written.reshape(-1),
            )
        for name, term in self.state_terms:
            totals[name] = term.total(params.get(name, {}), student, teacher, batch)
            loss += scales[name] * totals[name]
        for name, term in self.vector_terms:
            given = student, teacher, batch, temperatures.get(name)
            totals[name] = term.total(params.get(name, {}), *given)
            loss += scales[name] * totals[name]
        return loss, jax.lax.stop_gradient(totals)


def build_objective(
    config: Any,
    steps: int,
    student_policy: Policy,
    teacher_policy: Policy | None,
    chunk: int = 0,
    outputs: str = "tokens",
) -> tuple[Objective, dict[str, Schedule], dict[str, Schedule]]:
    """Builds the objective of `config`, and schedules of its coefficients and its temperatures, but
    for constant ones over logits; `steps` is the length of a whole run for schedules.

    `outputs` are those of the models: tokens (logits over a vocabulary), classes (over so few that
    the accuracy, which costs time, is logged as well), regression (a single number), or vector
    (of a text). Raises UserError for an unknown term, setting, position or schedule, and for terms
    that do not fit the task.
    """
    if not config:
        raise UserError("objective is empty: give it a term, such as objective.ce.weight")
    with_teacher = teacher_policy is not None
    of_classes = outputs in ("tokens", "classes")
    measured = (measures.KL_T1, measures.OUTSIDE) if with_teacher and of_classes else ()
    if outputs == "classes":
        measured += (measures.ACCURACY,)
    row_terms, state_terms, vector_terms, coefficients, temperatures = [], [], [], {}, {}
    for name, settings in config.items():
        key = f"objective.{name}"
        settings, make_term = _read(name, settings, key)
        coefficients[name] = value_schedule(settings.pop("weight"), steps, f"{key}.weight", WEIGHT)
        at, temperature = settings.pop("positions", None), settings.pop("temperature", None)
        rows, share = settings.pop("rows", "all"), settings.pop("share", None)
        term = make_term(**settings)
        if fault := _fault(term, at, temperature, with_teacher, outputs):
            raise UserError(key + fault)
        selection = _selection(term, rows, share, key, with_teacher, outputs)
        if not isinstance(term, Divergence | VectorTerm):
            state_terms.append((name, term))
            continue
        temperature = term.usual_temperature if temperature is None else temperature
        schedule = value_schedule(temperature, steps, f"{key}.temperature", TEMPERATURE)
        if isinstance(term, VectorTerm):
            vector_terms.append((name, term))
            temperatures |= {name: schedule} if term.has_temperature else {}
            continue
        constant = schedule(0) if isinstance(temperature, int | float) else None
        if constant is None:
            temperatures[name] = schedule
        positions = at or "supervised"
        row_terms.append(
            vocab.RowTerm(name, term, constant, positions=positions, selection=selection)
        )
    if not any(max(at(0), at(steps)) > 0 for at in coefficients.values()):
        names = ", ".join(f"objective.{name}.weight" for name in coefficients)
        raise UserError(f"{names}: all are 0, and nothing is learnt; set one above 0")
    policies = student_policy, teacher_policy
    terms = tuple(row_terms), tuple(state_terms), measured
    objective = Objective(*terms, *policies, chunk, tuple(vector_terms))
    return objective, coefficients, temperatures


def _read(name: str, settings: Any, key: str) -> tuple[dict[str, Any], Callable]:
    """Reads a term's section of the config, and finds the function that makes the term."""
    logged = measures.KL_T1, measures.REVERSE_KL_T1, measures.ENTROPY, measures.OUTSIDE
    if name in [term.name for term in (*logged, measures.ACCURACY)]:
        raise UserError(f"{key}: what is logged with the terms has this name; take another")
    try:
        settings = dict(settings)
    except (TypeError, ValueError):
        raise UserError(f"{key}={settings!r}: give settings, such as {key}.weight") from None
    if "weight" not in settings:
        raise UserError(f"{key} has no weight: add {key}.weight")
    make_term = plugins.load("objectives", settings.pop("term", name), "make").make
    # Keys of the term alone are the arguments of its `make`.
    own = inspect.signature(make_term).parameters
    have = ["weight", "term", "positions", "rows", "share", "temperature", *own]
    if unknown := sorted(set(settings) - set(have)):
        raise UserError(f"{key}: unknown {', '.join(unknown)}; have {', '.join(have)}")
    return settings, make_term


def _selection(
    term: Any, rows: str, share: float | None, key: str, with_teacher: bool, outputs: str
) -> Selection | None:
    """Reads which share of its positions a term over logits sees."""
    if rows == "all" and share is None:
        return None
    have = [name for name in BY if with_teacher or name != "teacher_entropy"]
    over_classes = isinstance(term, Divergence) and outputs != "regression"
    if rows not in have or not over_classes or share is None:
        raise UserError(
            f"{key}: rows={rows!r}, share={share!r}: for a term over logits give both, rows of "
            f"{', '.join(have)}, and a share above 0 and at most 1; or leave both out"
        )
    return Selection(rows, Real(above=0, most=1).check(share, f"{key}.share"))


def _fault(term: Any, at: str | None, temperature: Any, with_teacher: bool, outputs: str) -> str:
    """Describes what is wrong with a term's settings, to follow the key in a message; "" if
    nothing."""
    if isinstance(term, VectorTerm):
        if outputs != "vector":
            return " compares vectors of texts, and this task's models make none: use ce, mse or kl"
        if at is not None:
            return " takes no positions"
        if temperature is not None and not term.has_temperature:
            return " takes no temperature"
    elif isinstance(term, Divergence):
        if outputs == "vector":
            have = "embedding, similarity, margin_mse or contrastive"
            return f" compares logits, and this task's models make vectors: use {have}"
        if outputs == "regression" and "regression" not in term.suits:
            return " is for classes, and a regression has none: use mse or logit_mse"
        if outputs != "regression" and "classes" not in term.suits:
            return " is for a regression, and this task has classes: use ce"
        if temperature is not None and not term.has_temperature:
            return " takes no temperature"
        if at not in (None, "supervised", "all"):
            return f".positions={at!r}: have all, supervised"
        if at == "all" and (term.of_written or not term.needs_teacher):
            return ".positions='all': there are labels at supervised positions only"
    elif at is not None or temperature is not None:
        return " takes neither positions nor a temperature"
    if term.needs_teacher and not with_teacher:
        return " needs a teacher, and this stage has none"
    return ""


def held_out_objective(
    student_policy: Policy,
    teacher_policy: Policy | None = None,
    chunk: int = 0,
    mixed: bool = False,
    calibration: bool = False,
) -> Objective:
    """Makes the objective for evaluating a language model: loss (CE, nats a token) and accuracy,
    and with a teacher kl (teacher || student at T = 1, nats a token) and agreement.

    `mixed`: these are metrics of the ensemble's mean; those of the student alone are added as
    student_loss and so on. `calibration`: with the terms of `measures.CALIBRATION`.
    """
    figures = {"loss": ce.make(), "accuracy": measures.Accuracy()}
    if teacher_policy is not None:
        figures |= {"kl": kl.make(), "agreement": measures.Agreement()}
    subjects = {"": "mixture", "student_": "student"} if mixed else {"": None}
    measured = tuple(
        vocab.RowTerm(prefix + name, figure, of=subject)
        for prefix, subject in subjects.items()
        for name, figure in figures.items()
    )
    measured += measures.CALIBRATION if calibration else ()
    return Objective((), (), measured, student_policy, teacher_policy, chunk)
