"""Measures the start on many conversations: cold, while they are tokenized, and warm.

    python benchmarks/start_chats.py --folder=chats --tokenizer=QWEN
    python benchmarks/start_chats.py --folder=chats --tokenizer=QWEN --conversations=20000

Writes a table of made-up conversations (by default as many as Tulu-3 has, of a few dozen words),
then starts a process after the other on it, as a run of the task `chat` does up to its first batch:
with an empty cache, and twice with a filled one. Each prints a line of JSON: seconds and CPU
seconds, both from the start of Python, and the process's peak memory. What is in --folder already
is used again, but for the cache.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np

TULU = 940_000  # conversations
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have"


def write_table(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Writes `count` conversations of two to six short messages as chats.parquet."""
    import pyarrow
    import pyarrow.parquet

    file, random, words = folder / "chats.parquet", np.random.default_rng(0), WORDS.split()
    kind = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})
    schema = pyarrow.schema({"id": pyarrow.string(), "messages": pyarrow.list_(kind)})
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, count, 10_000):
            numbers = range(start, min(start + 10_000, count))
            turns = 2 * random.integers(1, 4, len(numbers))
            lengths = iter(random.integers(3, 30, turns.sum()).tolist())
            drawn = iter(random.integers(0, len(words), 30 * turns.sum()).tolist())
            rows = [
                [
                    {
                        "role": "assistant" if turn % 2 else "user",
                        "content": " ".join(words[next(drawn)] for _ in range(next(lengths))),
                    }
                    for turn in range(each)
                ]
                for each in turns.tolist()
            ]
            columns = {"id": [f"chat {number}" for number in numbers], "messages": rows}
            writer.write_table(pyarrow.table(columns, schema))
    return file


def start(folder: pathlib.Path, tokenizer: str) -> dict[str, float]:
    """Starts on the table in `folder`, up to the first batch of training."""
    from kd_jax.data import tokenizers
    from kd_jax.tasks import chat

    source = dict(source="files", path=str(folder / "chats.parquet"))
    data = dict(train=source, held_out=0.01, cache_dir=str(folder / "cache"))
    task = chat.make(dict(name="chat", seq_len=1024), data, tokenizers.load_tokenizer(tokenizer))
    about = task.prepare()["train"]
    batch = task.train(16, seed=0)[0]
    with open("/proc/self/stat") as stat:
        began = int(stat.read().rsplit(") ", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return dict(
        seconds=round(time.clock_gettime(time.CLOCK_BOOTTIME) - began, 2),
        cpu_seconds=round(time.process_time(), 2),
        peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        conversations=about["conversations"],
        rows=about["rows"],
        tokens=about["tokens"],
        first=int(batch.tokens_BT.sum()),
    )


def measure(folder: pathlib.Path, tokenizer: str) -> dict[str, float]:
    """Starts in a new process; returns what it has printed."""
    command = [sys.executable, __file__, f"--folder={folder}", f"--tokenizer={tokenizer}"]
    done = subprocess.run([*command, "--child"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True, help="folder of a chat model's tokenizer")
    parser.add_argument("--conversations", type=int, default=TULU)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(start(args.folder, args.tokenizer)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "chats.parquet").exists():
        write_table(args.folder, args.conversations)
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    for name in ("cold", "warm", "warm again"):
        print(name, json.dumps(measure(args.folder, args.tokenizer)), flush=True)


if __name__ == "__main__":
    main()
