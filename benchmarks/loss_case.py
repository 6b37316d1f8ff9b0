"""The loss that is timed and checked: its shapes, inputs, and its value and gradients in float64.

Read by every process of the benchmark, so it imports numpy alone: a row's peak memory is its own.
As a script it writes inputs and float64 results of both precisions to a folder.
"""

import argparse
import dataclasses
import pathlib

import ml_dtypes
import numpy as np

# The weights of cross-entropy with the labels, and of the divergence of that name.
LOSSES = {
    "forward KL": (0.0, "kl"),
    "reverse KL": (0.0, "reverse_kl"),
    "JSD 0.5": (0.0, "jsd"),
    "CE + KL": (0.5, "kl"),
}
BETA = 0.5  # of jsd, which is (KL(teacher || m) + KL(student || m)) / 2 here
PRECISIONS = ("fp32", "bf16")
REFERENCE_ROWS = 128  # of a chunk in float64


@dataclasses.dataclass(frozen=True)
class Shape:
    rows: int = 2048
    width: int = 384
    vocab_size: int = 50_257

    def inputs(self, precision: str) -> dict[str, np.ndarray]:
        """Features (N, D) and unembeddings (V, D) of student and teacher, float32, and labels (N,).

        The two models are related, KL of about 1.4 nats a row. In bf16 all numbers are bfloat16's,
        so that what is compared with float64 are the systems' own roundings.
        """
        rng = np.random.default_rng(0)
        draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        features_ND, unembed_VD = draw(self.rows, self.width), draw(self.vocab_size, self.width)
        unembed_VD *= np.float32(3 / self.width**0.5)  # logits of deviation 3
        found = {
            "student_ND": features_ND + 0.4 * draw(self.rows, self.width),
            "student_VD": unembed_VD + 0.3 * unembed_VD.std() * draw(*unembed_VD.shape),
            "teacher_ND": features_ND,
            "teacher_VD": unembed_VD,
        }
        if precision == "bf16":
            found = {k: x.astype(ml_dtypes.bfloat16).astype(np.float32) for k, x in found.items()}
        return found | {"labels_N": rng.integers(0, self.vocab_size, self.rows).astype(np.int32)}


TINY = Shape(rows=64, width=16, vocab_size=512)


def load(folder: pathlib.Path, precision: str) -> dict[str, np.ndarray]:
    """The inputs of a precision."""
    return dict(np.load(folder / f"{precision}.npz"))


def errors(
    folder: pathlib.Path, precision: str, loss: str, value: float, *gradients: np.ndarray
) -> dict[str, float]:
    """Relative errors of the value and of the gradients of the student's features and unembedding:
    ||found - wanted|| / ||wanted||."""
    wanted = np.load(folder / f"{precision} {loss}.npz")
    found = {"value": np.float64(value)}
    found |= zip(("features", "unembedding"), gradients, strict=True)
    return {
        name: float(np.linalg.norm(np.float64(x) - wanted[name]) / np.linalg.norm(wanted[name]))
        for name, x in found.items()
    }


def _log_softmax(x_ND: np.ndarray, w_VD: np.ndarray) -> np.ndarray:
    logits_CV = x_ND.astype(np.float64) @ w_VD.T
    logits_CV -= logits_CV.max(axis=1, keepdims=True)
    return logits_CV - np.log(np.exp(logits_CV).sum(axis=1, keepdims=True))


def _divergence(name: str, log_p_CV: np.ndarray, log_q_CV: np.ndarray):
    """Of each row, (C,), and its gradient with respect to the student's logits, (C, V): p of the
    student, q of the teacher."""
    p_CV, q_CV = np.exp(log_p_CV), np.exp(log_q_CV)
    if name == "kl":
        return (q_CV * (log_q_CV - log_p_CV)).sum(1), p_CV - q_CV
    log_m_CV = log_q_CV
    value_C, share = 0.0, 1.0
    if name == "jsd":
        log_m_CV, share = np.log(BETA * q_CV + (1 - BETA) * p_CV), 1 - BETA
        value_C = BETA * (q_CV * (log_q_CV - log_m_CV)).sum(1)
    slope_CV = log_p_CV - log_m_CV
    own_C = (p_CV * slope_CV).sum(1)
    return value_C + share * own_C, share * p_CV * (slope_CV - own_C[:, None])


def reference(inputs: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Value, the mean over rows, and gradients of every loss in float64."""
    student_VD, teacher_VD = (inputs[f"{who}_VD"].astype(np.float64) for who in WHO)
    num_rows = len(inputs["labels_N"])
    found = {
        loss: {
            "value": 0.0,
            "features": np.zeros(inputs["student_ND"].shape),
            "unembedding": np.zeros(student_VD.shape),
        }
        for loss in LOSSES
    }
    for start in range(0, num_rows, REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        x_CD, labels_C = inputs["student_ND"][rows].astype(np.float64), inputs["labels_N"][rows]
        numbers_C = np.arange(len(labels_C))
        log_p_CV = _log_softmax(x_CD, student_VD)
        log_q_CV = _log_softmax(inputs["teacher_ND"][rows], teacher_VD)
        for loss, (of_labels, name) in LOSSES.items():
            value_C, slope_CV = _divergence(name, log_p_CV, log_q_CV)
            if of_labels:
                value_C = (1 - of_labels) * value_C - of_labels * log_p_CV[numbers_C, labels_C]
                slope_CV = (1 - of_labels) * slope_CV + of_labels * np.exp(log_p_CV)
                slope_CV[numbers_C, labels_C] -= of_labels
            sums = found[loss]
            sums["value"] += value_C.sum() / num_rows
            sums["features"][rows] = slope_CV @ student_VD / num_rows
            sums["unembedding"] += slope_CV.T @ (x_CD / num_rows)
    return found


WHO = ("student", "teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--precision", required=True, choices=PRECISIONS)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    inputs = (TINY if args.tiny else Shape()).inputs(args.precision)
    np.savez(args.out / f"{args.precision}.npz", **inputs)
    for loss, results in reference(inputs).items():
        np.savez(args.out / f"{args.precision} {loss}.npz", **results)


if __name__ == "__main__":
    main()
