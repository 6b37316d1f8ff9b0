"""One kd_jax process of the benchmark of losses: times value and gradients, compares them with
float64, and prints one line of JSON."""

import jax
import jax.numpy as jnp
import loss_case
import loss_timing
import numpy as np

from kd_jax.cli import start_jax
from kd_jax.objectives import ce, jsd, kl, reverse_kl, vocab
from kd_jax.precision import policy_for

DIVERGENCES = {
    "kl": kl.make(),
    "reverse_kl": reverse_kl.make(),
    "jsd": jsd.make(beta=loss_case.BETA, scaled=False),
}


def main() -> None:
    args = loss_timing.arguments().parse_args()
    start_jax()
    inputs = {k: jnp.asarray(x) for k, x in loss_case.load(args.folder, args.precision).items()}
    num_rows, policy = len(inputs["labels_N"]), policy_for(args.precision, jax.default_backend())
    of_labels, name = loss_case.LOSSES[args.loss]
    scales = {name: jnp.float32((1 - of_labels) / num_rows)}
    terms = [vocab.RowTerm(name, DIVERGENCES[name])]
    if of_labels:
        terms.append(vocab.RowTerm("ce", ce.make()))
        scales["ce"] = jnp.float32(of_labels / num_rows)
    engine = vocab.Engine(tuple(terms), policy, policy)
    weights = {term: jnp.ones(num_rows) for term in scales}

    @jax.jit
    def both(inputs, weights, scales):
        def loss(student):
            teacher = vocab.Head(inputs["teacher_ND"], inputs["teacher_VD"], None)
            rest = inputs["labels_N"], weights, scales, {}
            return vocab.vocab_loss(engine, student, teacher, *rest)[0]

        student = vocab.Head(inputs["student_ND"], inputs["student_VD"], None)
        return jax.value_and_grad(loss)(student)

    def step():
        value, grads = jax.block_until_ready(both(inputs, weights, scales))
        return float(value), grads.features_ND, grads.unembed_VD

    loss_timing.run(step, args, np.asarray)


if __name__ == "__main__":
    main()
