"""One process of the embedding benchmark; prints one line of JSON."""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from timing import timed

COMPARED = 200  # texts whose vectors are compared with those of sentence-transformers

Encode = Callable[[list[str]], np.ndarray]  # (N, D)


def of_kd_jax(args: argparse.Namespace) -> Encode:
    """What the Python API does with a list of texts, reading the checkpoint included."""
    import kd_jax

    model = kd_jax.load(args.model)
    return lambda texts: model.embed(texts, batch_size=args.batch_size)


def of_pytorch(args: argparse.Namespace) -> Encode:
    """sentence-transformers, which sorts texts by length."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(args.model), device="cpu", local_files_only=True)
    how = dict(batch_size=args.batch_size, show_progress_bar=False)
    return lambda texts: model.encode(texts, **how)


def of_onnx(args: argparse.Namespace) -> Encode:
    """ONNX Runtime on batches of similar length, with the tokenizer of sentence-transformers."""
    import onnxruntime
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    stated = json.loads((args.model / "sentence_bert_config.json").read_text())
    session = onnxruntime.InferenceSession(args.graph, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    how: dict[str, Any] = dict(padding=True, truncation=True, max_length=stated["max_seq_length"])

    def encode(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        found = []
        for start in range(0, len(order), args.batch_size):
            some = [texts[row] for row in order[start : start + args.batch_size]]
            read = tokenizer(some, return_tensors="np", **how)
            given = {name: read[name] for name in names}
            found.append(session.run(["sentence_embedding"], given)[0])
        vectors_ND = np.concatenate(found)
        sorted_ND = np.empty_like(vectors_ND)
        sorted_ND[order] = vectors_ND
        return sorted_ND

    return encode


SYSTEMS = {"kd_jax": of_kd_jax, "pytorch": of_pytorch, "onnx": of_onnx}


def compared(values: Sequence) -> Sequence:
    """Takes some of the texts, or of their vectors, from everywhere."""
    return values[:: max(1, len(values) // COMPARED)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", choices=SYSTEMS)
    parser.add_argument("--prepare", action="store_true", help="write graphs and --reference")
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--graph", type=pathlib.Path)
    parser.add_argument("--texts", required=True, type=pathlib.Path, help="one a line")
    parser.add_argument("--count", required=True, type=int)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--reference", required=True, type=pathlib.Path)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    texts = args.texts.read_text(encoding="utf-8").splitlines()[: args.count]
    if args.prepare:
        np.save(args.reference, of_pytorch(args)(compared(texts)))
        if args.graph:
            from kd_jax.recipes import export

            export.export_checkpoint(str(args.model), None, str(args.graph), with_onnx=True)
        return
    encode, found = SYSTEMS[args.system](args), []

    def step() -> float:
        found[:] = [encode(texts)]
        return float(found[0].sum())

    result = timed(step, args)
    own_ND, reference_ND = compared(found[0]), np.load(args.reference)
    lengths = [np.linalg.norm(each, axis=1) for each in (own_ND, reference_ND)]
    cosines = (own_ND * reference_ND).sum(1) / (lengths[0] * lengths[1])
    result |= {"apart": float(np.abs(own_ND - reference_ND).max())}
    print(json.dumps(result | {"cosine": float(cosines.min()), "texts": len(found[0])}))


if __name__ == "__main__":
    main()
