"""One kd_jax process of the HellaSwag benchmark; prints one line of JSON. The pass is that of
recipes/evaluate.py."""

import jax
from hellaswag_pass import arguments, time_passes

from kd_jax.cli import start_jax
from kd_jax.data import tokenizers
from kd_jax.models import family, hf
from kd_jax.precision import policy_for
from kd_jax.recipes import evaluate
from kd_jax.run import measure, subject
from kd_jax.train import sharding
from kd_jax.types import Model


def main() -> None:
    parser = arguments()
    parser.add_argument("--own_batch_size", action="store_true", help="that of kd_jax.evaluate")
    args = parser.parse_args()
    batch_size = subject.ROWS if args.own_batch_size else args.batch_size
    start_jax()
    policy = policy_for("fp32", jax.default_backend())
    kind, config = family.read(hf.read_config(args.model))
    graphdef = family.abstract(kind, config, "clm", policy).graphdef
    model, mesh = Model(hf.load(args.model, kind, config, "clm"), graphdef), sharding.make_mesh()
    task = evaluate.make_task("hellaswag", str(args.data), evaluate.Options())
    scored = task.encoded(tokenizers.load_tokenizer(args.model), config.max_tokens)

    def one_pass():
        return measure.score(model, scored, policy, batch_size, mesh).log_likelihoods_N

    def judge(values_N):
        figures = scored.figures(values_N)
        return {key: figures[key] for key in ("acc", "acc_norm")}

    time_passes(one_pass, judge, args)


if __name__ == "__main__":
    main()
