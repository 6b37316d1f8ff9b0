"""One PyTorch process of the HellaSwag benchmark; prints one line of JSON.

Written as the lm-evaluation-harness scores: endings sorted by length, the longest first, batches
padded on the right without a mask (causal models need none), log-softmax in float32, the sum over
the ending's tokens.
"""

import json
import re

import numpy as np
import torch
import transformers
from hellaswag_pass import arguments, time_passes


def cleaned(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read(args, tokenizer):
    """(ids of context and ending of every ending; characters of the endings, labels)."""
    rows, characters, labels = [], [], []
    for row in map(json.loads, args.data.read_text().splitlines()):
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        context = cleaned(context)
        kept, rest = context.rstrip(), context[len(context.rstrip()) :]
        before = tokenizer.encode(kept)
        endings = [cleaned(ending) for ending in row["endings"]]
        for ending in endings:
            rows.append((before, tokenizer.encode(f"{kept}{rest} {ending}")[len(before) :]))
        characters.append([len(ending) for ending in endings])
        labels.append(int(row["label"]))
    return rows, np.array(characters), np.array(labels)


def main() -> None:
    parser = arguments()
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    never = dict(trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, **never)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, **never).eval()
    rows, characters_QE, labels_Q = read(args, tokenizer)
    most = model.config.max_position_embeddings
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n][0] + rows[n][1]))

    def one_pass() -> np.ndarray:
        found = np.empty(len(rows))
        with torch.inference_mode():
            for start in range(0, len(order), args.batch_size):
                chosen = order[start : start + args.batch_size]
                inputs = [torch.tensor(sum(rows[n], [])[-(most + 1) :][:-1]) for n in chosen]
                tokens_BT = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
                logs_BTV = torch.log_softmax(model(tokens_BT).logits.float(), dim=-1)
                for n, row, logs_TV in zip(chosen, inputs, logs_BTV, strict=True):
                    ending = torch.tensor(rows[n][1])
                    logs = logs_TV[len(row) - len(ending) : len(row)].gather(1, ending[:, None])
                    found[n] = logs.sum().item()
        return found

    def judge(values_N):
        values_QE = values_N.reshape(characters_QE.shape)
        return {
            "acc": (values_QE.argmax(1) == labels_Q).mean(),
            "acc_norm": ((values_QE / characters_QE).argmax(1) == labels_Q).mean(),
        }

    time_passes(one_pass, judge, args)


if __name__ == "__main__":
    main()
