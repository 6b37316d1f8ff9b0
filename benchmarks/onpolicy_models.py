"""Writes what all rows of the on-policy benchmark start from, to OUT.

teacher/, student/  HF checkpoints that end their texts with the same tokens
stories.txt         the documents whose beginnings are prompts, one a paragraph
prompts.json        these beginnings, as texts that have as many tokens in every tokenizer's hands
"""

import argparse
import json
import pathlib
import random

import tokenizers
import torch
import transformers
from onpolicy_cases import PROMPT, PROMPTS, STOP, TEXT, TINY_NEW

WORDS = "once upon a time there was girl boy dog tree who saw big red ball and ran to it".split()


def tiny(out: pathlib.Path) -> str:
    """Random models of two layers and of one, with a tokenizer of words; returns stories."""
    names = ["<unk>", "<s>", "</s>", *WORDS]
    vocabulary = {name: index for index, name in enumerate(names)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    own = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(vocab_size=len(names), max_position_embeddings=64, initializer_range=0.3)
    for layers, name in ((2, "teacher"), (1, "student")):
        torch.manual_seed(layers)
        config = transformers.LlamaConfig(
            num_hidden_layers=layers,
            num_key_value_heads=1,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
            **sizes,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(out / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **own).save_pretrained(
            out / name
        )
    choose = random.Random(0)
    count = 2 * PROMPT + TINY_NEW
    return "\n\n".join(" ".join(choose.choices(WORDS, k=count)) for _ in range(80))


def copy(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies a checkpoint, with the ends of texts of the benchmark."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.generation_config.eos_token_id = list(STOP)
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out)


def write_prompts(folder: pathlib.Path, text: str) -> int:
    """Keeps the stories whose first tokens are the same ones when their text is read again; returns
    their number. The first story of a text has no beginning (tasks/clm.py): there is one more."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher")
    stories, prompts = [], []
    for story in filter(None, map(str.strip, text.split("\n\n"))):
        tokens = tokenizer(story)["input_ids"]
        beginning = tokenizer.decode(tokens[:PROMPT], skip_special_tokens=True)
        if len(tokens) > PROMPT and tokenizer(beginning)["input_ids"] == tokens[:PROMPT]:
            stories.append(story)
            prompts.append(beginning)
    (folder / TEXT).write_text("\n\n".join([*stories[:1], *stories]) + "\n")
    (folder / PROMPTS).write_text(json.dumps(prompts))
    return len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=pathlib.Path)
    parser.add_argument("--student", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        text = tiny(args.out)
    else:
        text = args.text.read_text()
        copy(args.teacher, args.out / "teacher")
        copy(args.student, args.out / "student")
    print(json.dumps({"prompts": write_prompts(args.out, text)}))


if __name__ == "__main__":
    main()
