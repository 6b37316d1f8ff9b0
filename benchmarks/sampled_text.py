"""Has a causal language model write the text that a smaller one is then trained on.

    python benchmarks/sampled_text.py --model=FOLDER --out=FILE --texts=4000

Texts begin as the tokenizer's do and end with its end token, or after --tokens; one a paragraph, no
line breaks within. Drawn at temperature 1 from the model's whole distribution, so that they are
what the model itself expects.
"""

import argparse
from pathlib import Path

import rich.progress

from kd_jax.cli import start_jax
from kd_jax.data import tokenizers
from kd_jax.data.continuations import beginning
from kd_jax.models import family, hf
from kd_jax.models.generate import Sampling, generate
from kd_jax.precision import policy_for
from kd_jax.types import Model

ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="an HF checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="text file to write")
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=500, help="of a text at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start_jax()
    kind, config = family.read(hf.read_config(options.model))
    graphdef = family.abstract(kind, config, "clm", policy_for("fp32", "cpu")).graphdef
    model = Model(hf.load(options.model, kind, config, "clm"), graphdef)
    tokenizer = tokenizers.load_tokenizer(options.model)
    start, end = beginning(tokenizer), tokenizer.eos_token_id
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tokens = 0
    with options.out.open("w", encoding="utf-8") as out:
        for number in rich.progress.track(range(-(-options.texts // ROWS))):
            rows = min(ROWS, options.texts - number * ROWS)
            written = generate(
                model,
                [[start]] * rows,
                Sampling(options.tokens, temperature=1.0, stop=(start, end)),
                options.seed * 1_000_000 + number,
            )
            for row in written:
                tokens += len(row)
                words = tokenizer.decode(row, skip_special_tokens=True).split()
                out.write(" ".join(words) + "\n\n")
    print(f"{options.out}: {options.texts} texts, {tokens:,} tokens")


if __name__ == "__main__":
    main()
