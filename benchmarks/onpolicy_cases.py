"""What the systems of the on-policy benchmark have in common.

Read by every process of it, so it imports the standard library alone.
"""

import argparse
import json
import pathlib

ROWS, PROMPT, NEW = 32, 16, 64  # prompts of a step, tokens of one, tokens written after each
TINY_ROWS, TINY_NEW = 8, 8
WARM = 3  # steps before the stop-watch starts, of which the first one compiles
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.01, 1.0
BETAS, EPSILON = (0.9, 0.999), 1e-8
STOP = (1, 2)  # token ids that end a story: what separates the data's, and the model's own end
TEXT, PROMPTS = "stories.txt", "prompts.json"  # files of onpolicy_models.py


def arguments() -> argparse.ArgumentParser:
    """Arguments of every timed process."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--precision", required=True, choices=("fp32", "bf16"))
    parser.add_argument("--folder", required=True, type=pathlib.Path, help="of onpolicy_models.py")
    parser.add_argument("--steps", required=True, type=int, help="timed steps")
    parser.add_argument("--tiny", action="store_true")
    return parser


def sizes(args: argparse.Namespace) -> tuple[int, int]:
    """Prompts of a step, and tokens that are written after each."""
    return (TINY_ROWS, TINY_NEW) if args.tiny else (ROWS, NEW)


def prompts(folder: pathlib.Path) -> list[str]:
    """The texts of the prompts."""
    return json.loads((folder / PROMPTS).read_text())
