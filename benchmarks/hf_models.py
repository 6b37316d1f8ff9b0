"""Writes a case's teacher and student, randomly initialised, as HF checkpoints: OUT/teacher and
OUT/student. All rows of the benchmark start from these weights."""

import argparse
import pathlib

import torch
import transformers
from cases import CASES, TINY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()
    case = (TINY if args.tiny else CASES)[args.case]

    layers = {"teacher": case.teacher_layers, "student": case.student_layers}
    for seed, (name, count) in enumerate(layers.items()):
        torch.manual_seed(seed)
        settings = case.hf_config(count, args.dropout)
        config = transformers.AutoConfig.for_model(**settings)
        model = getattr(transformers, settings["architectures"][0])(config)
        model.save_pretrained(args.out / name)


if __name__ == "__main__":
    main()
