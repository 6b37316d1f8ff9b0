"""Collects the texts on which embedders are trained, and the pairs that select a checkpoint.

    python benchmarks/embedding_texts.py --data=$KD_JAX_DATA [--out=runs/embedding]

Writes texts.txt, one text a line, each once, in an order drawn by a fixed seed: the sentences of
the training sets of STS-B, MRPC and CoLA, of PhraseBank, AG News (alps_dev.tsv, of its training
set), contexts and questions of cs224n's SQuAD, sentences of Wikipedia and WikiText-2 (valid), and
some of SST-2's training set, which is mostly parts of the same sentences; and validation.tsv, a
third of the rows of STS-B's training set. Left out of texts.txt: every text of validation.tsv, of
STS-B's dev set and of xquad.en.json, which are reported on, and lines below three words.
"""

import argparse
import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

VALIDATION = 1 / 3  # of STS-B's training rows
REVIEWS = 10_000  # texts of SST-2, of at least so many words:
WORDS = 8
ENDS = re.compile(r"(?<=[.!?])\s+|\n")  # of sentences


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def squad(path: Path) -> Iterator[str]:
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"]
            yield from (question["question"] for question in paragraph["qas"])


def sentences(
    rows_of_pairs: list[dict[str, str]], one: str = "sentence1", other: str = "sentence2"
) -> Iterator[str]:
    for row in rows_of_pairs:
        yield from (row[one], row[other])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder to read")
    parser.add_argument("--out", default=Path("runs/embedding"), type=Path, help="folder to write")
    options = parser.parse_args()
    draws, glue = random.Random(0), options.data / "glue"
    pairs = rows(glue / "STS-B" / "train.tsv")
    draws.shuffle(pairs)
    cut = round(VALIDATION * len(pairs))
    held, pairs = pairs[:cut], pairs[cut:]
    reported = [*sentences(held), *sentences(rows(glue / "STS-B" / "dev.tsv"))]
    reported += squad(options.data / "squad" / "xquad.en.json")
    tests = {" ".join(text.split()) for text in reported}
    news = (options.data / "ag_news" / "alps_dev.tsv").read_text(encoding="utf-8")
    lm = [
        options.data / "lm_text" / "wiki_demo.txt",
        options.data / "wikitext-2-raw" / "wiki.valid.raw",
    ]
    wiki = [ENDS.split(file.read_text(encoding="utf-8")) for file in lm]
    reviews = [row["sentence"] for row in rows(glue / "SST-2" / "train.tsv")]
    reviews = [text for text in reviews if len(text.split()) >= WORDS]
    cola = (glue / "CoLA" / "train.tsv").read_text(encoding="utf-8").splitlines()
    bank = options.data / "financial_phrasebank" / "Sentences_50Agree.txt"
    found = {
        "STS-B": sentences(pairs),
        "MRPC": sentences(rows(glue / "MRPC" / "train.tsv"), "#1 String", "#2 String"),
        "CoLA": (line.split("\t")[3] for line in cola),
        "SST-2": draws.sample(reviews, REVIEWS),
        "PhraseBank": (line.rpartition("@")[0] for line in bank.read_text("latin-1").splitlines()),
        "AG News": (line.partition("\t")[0] for line in news.splitlines()),
        "SQuAD": squad(options.data / "squad" / "cs224n-dev-v2.0.json"),
        "Wikipedia": wiki[0],
        "WikiText-2": (text.replace(" @-@ ", "-").replace(" @,@ ", ",") for text in wiki[1]),
    }
    texts: dict[str, str] = {}
    for name, source in found.items():
        for text in (" ".join(each.split()) for each in source):
            if len(text.split()) > 2 and text not in tests:
                texts.setdefault(text, name)
    lines = [*texts]
    draws.shuffle(lines)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (options.out / "validation.tsv").open("w", encoding="utf-8") as file:
        names = ("sentence1", "sentence2", "score")
        for row in ({name: name for name in names}, *held):
            print(*(row[name] for name in names), sep="\t", file=file)
    counts = {name: list(texts.values()).count(name) for name in found}
    print(f"{options.out}: {len(lines):,} texts {counts}, {len(held):,} pairs to select by")


if __name__ == "__main__":
    main()
