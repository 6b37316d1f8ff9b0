"""Collects English text of different files into one, a document a paragraph, for training on.

    python benchmarks/real_text.py --data=FOLDER --out=FILE

Reads WikiText's validation split and other .txt, .raw, .jsonl, .json, .csv and .tsv files below
FOLDER. Left out: what is reported on (WikiText's test split, HellaSwag, CBT), files of tokenizers
and licences, and paragraphs that occurred before or have fewer than eight words.
"""

import argparse
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = re.compile(r"wiki\.test|hellaswag|cbt|tokenizers/|README|License|classes\.txt", re.I)
KEYS = {"text", "content", "context"}  # of JSON objects


def strings(value, wanted: bool = False) -> Iterator[str]:
    """Strings under the wanted keys, however deep."""
    if isinstance(value, str) and wanted:
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(inner, wanted=key in KEYS)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, wanted)


def paragraphs(path: Path) -> Iterator[str]:
    """The text of one file."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if path.suffix == ".jsonl":
        for line in text.splitlines():
            yield from strings(json.loads(line))
    elif path.suffix == ".json":
        yield from strings(json.loads(text))
    elif path.suffix in (".csv", ".tsv"):
        options = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if path.suffix == ".tsv" else {}
        for row in csv.reader(text.splitlines(), **options):
            yield from row
    elif path.suffix in (".txt", ".raw"):
        for line in text.splitlines():
            yield re.sub(r"@\w+$", "", line)  # PhraseBank's labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder to read")
    parser.add_argument("--out", required=True, type=Path, help="text file to write")
    options = parser.parse_args()
    seen: set[str] = set()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as out:
        for path in sorted(path for path in options.data.rglob("*") if path.is_file()):
            if LEFT_OUT.search(path.relative_to(options.data).as_posix()):
                continue
            for text in paragraphs(path):
                text = " ".join(text.split())
                if text.count(" ") >= 7 and text not in seen:
                    seen.add(text)
                    out.write(text + "\n\n")
    print(f"{options.out}: {len(seen)} paragraphs, {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
