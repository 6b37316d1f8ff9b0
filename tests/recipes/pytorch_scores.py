"""The same scores by PyTorch and HF modules alone, one text at a time, written after the papers and
the lm-evaluation-harness."""

import json
import re

import torch


def log_likelihood(model, before, scored, limit):
    """Sum of log p of the tokens `scored` after `before`, of which as many are read as fit."""
    ids = (before + scored)[-(limit + 1) :]
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids[:-1]])).logits[0].double()
    logs_TV = torch.log_softmax(logits_TV[-len(scored) :], dim=-1)
    return logs_TV.gather(1, torch.tensor(scored)[:, None]).sum().item()


def ending(model, tokenizer, context, text, limit):
    """Of `text` after `context` and a space."""
    context, space = context.rstrip(), context[len(context.rstrip()) :]
    before = tokenizer.encode(context)
    whole = tokenizer.encode(context + space + " " + text)
    return log_likelihood(model, before, whole[len(before) :], limit)


def hellaswag(model, tokenizer, file, limit):
    """(log-likelihoods of all endings, acc, acc_norm)."""

    def clean(text):
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    values, right, right_norm = [], [], []
    for row in map(json.loads, file.read_text().splitlines()):
        texts = [clean(text) for text in row["endings"]]
        context = row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()
        found = [ending(model, tokenizer, clean(context), text, limit) for text in texts]
        normed = [value / len(text) for value, text in zip(found, texts, strict=True)]
        right.append(found.index(max(found)) == row["label"])
        right_norm.append(normed.index(max(normed)) == row["label"])
        values += found
    return values, sum(right) / len(right), sum(right_norm) / len(right)


def cbt(model, tokenizer, file, limit):
    """(log-likelihoods of the query line with each word, accuracy)."""
    values, right = [], []
    for example in file.read_text().strip().split("\n\n"):
        *context, query = [line.split(" ", 1)[1] for line in example.split("\n")]
        query, answer, _, words = query.split("\t")
        words = words.split("|")
        texts = [query.replace("XXXXX", word) for word in words]
        found = [ending(model, tokenizer, " ".join(context), text, limit) for text in texts]
        right.append(words[found.index(max(found))] == answer)
        values += found
    return values, sum(right) / len(right)


def nats(model, ids, window, stride):
    """(sum of -log p of all tokens but the first, how many they are)."""
    total, done = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window + 1, len(ids))
        if end > done:
            total -= log_likelihood(model, ids[begin:done], ids[done:end], window)
            done = end
    return total, len(ids) - 1
