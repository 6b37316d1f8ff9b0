"""One process of the benchmark of losses with TRL's kernels: times value and gradients, compares
them with float64, and prints one line of JSON.

Parameters are float32; in bf16 the kernels run under torch.autocast, as in TRL's trainers.
"""

import loss_case
import loss_timing
import torch
from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

BETAS = {"kl": 0.0, "jsd": loss_case.BETA, "reverse_kl": 1.0}


def main() -> None:
    args = loss_timing.arguments().parse_args()
    inputs = {
        k: torch.from_numpy(x) for k, x in loss_case.load(args.folder, args.precision).items()
    }
    student = [inputs["student_ND"].requires_grad_(), inputs["student_VD"].requires_grad_()]
    teacher, labels_N = (inputs["teacher_ND"], inputs["teacher_VD"]), inputs["labels_N"].long()
    of_labels, name = loss_case.LOSSES[args.loss]

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            values_N, _ = ChunkedDivergenceFunction.apply(
                *student, None, *teacher, None, BETAS[name]
            )
            loss = (1 - of_labels) * values_N.mean()
            if of_labels:
                log_probs_N, *_ = ChunkedLogProbFunction.apply(
                    *student, None, labels_N, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
                )
                loss = loss - of_labels * log_probs_N.mean()
        for each in student:
            each.grad = None
        loss.backward()
        return float(loss), *(each.grad for each in student)

    loss_timing.run(step, args, lambda gradient: gradient.numpy())


if __name__ == "__main__":
    main()
