"""Many conversations: a start reads no more of them than it has to, and keeps none in memory."""

import json
import os
import tracemalloc

import pyarrow.parquet
import pytest

from benchmarks import start_chats
from kd_jax.data import chats as conversations
from kd_jax.data import tokenizers
from kd_jax.tasks import chat
from tests.tasks import chats

OLD = 1_700_000_000  # seconds since 1970


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chats.tokenizer(folder).save_pretrained(folder)
    return str(folder)


def test_the_benchmark_starts_cold_and_warm(tmp_path, tokenizer, monkeypatch):
    file = start_chats.write_table(tmp_path, 300)
    os.utime(file, (OLD, OLD))
    cold = start_chats.start(tmp_path, tokenizer)
    assert cold["conversations"] == 297 and cold["rows"] < 90 and cold["peak_gb"] > 0.1
    for module, name in ((pyarrow.parquet, "ParquetFile"), (conversations.Template, "encode")):
        monkeypatch.setattr(module, name, None)  # neither read nor tokenized again
    warm = start_chats.start(tmp_path, tokenizer)
    assert all(warm[key] == cold[key] for key in ("conversations", "rows", "tokens", "first"))


def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(conversations, "_SLICE", 20_000)
    table = pyarrow.parquet.read_table(start_chats.write_table(tmp_path, 300))
    file, text = tmp_path / "chats.jsonl", "".join(json.dumps(r) + "\n" for r in table.to_pylist())
    data = {"train": {"path": str(file)}}
    peaks = []
    for count in (1, 1, 3):  # once to fill the caches of libraries
        file.write_text(text * count)
        os.utime(file, (OLD + count, OLD + count))
        data["cache_dir"] = str(tmp_path / f"cache-{len(peaks)}")
        for _ in ("cold", "warm"):
            task = chat.make({"name": "chat"}, data, tokenizers.load_tokenizer(tokenizer))
            tracemalloc.start()
            task.prepare()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    cold, warm, larger_cold, larger_warm = peaks[2:]
    assert larger_cold - cold < len(text)  # a half of what there was more, as it stands in the file
    assert larger_warm < 1.1 * warm
