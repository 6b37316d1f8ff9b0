"""Ways to a small model in one table, from what was scored of their runs."""

import json

import pytest

from kd_jax.evals import tables


def score(perplexity, acc, apart=None):
    beside = {"beside_teacher": {"mean_difference": apart}} if apart is not None else {}
    interval = [acc - 0.03, acc + 0.03]
    return (
        {"model": "runs/x", "seconds": 3.0, "perplexity": perplexity, "parameters": 1000},
        {"model": "runs/x", "acc": acc, "acc_interval": interval} | beside,
    )


def write(folder, **stages):
    folder.mkdir(exist_ok=True)
    for i, task in enumerate(tables.SCORED):
        found = {stage: figures[i] for stage, figures in stages.items()}
        (folder / f"{task}.json").write_text(json.dumps({"stages": found}))


def run(folder, seed, **stages):
    write(folder, **stages)
    effort = {stage: {"steps": 10 + seed, "training_flops": 2e12} for stage in stages}
    return {"seed": seed, "stages": effort, "scores": tables.read_scores(folder)}


@pytest.fixture
def two(tmp_path):
    """Two seeds; substitution is 3 and 5 below pruning."""
    teacher = score(50.0, 0.4)
    return [
        run(
            tmp_path / str(seed),
            seed,
            teacher=teacher,
            substitute=score(57.0 - seed, 0.30 + 0.02 * seed, 1.0),
            prune=score(60.0 + seed, 0.2, 2.0 + seed),
        )
        for seed in (0, 1)
    ]


def test_a_row_is_a_mean_over_seeds(two):
    header, _, original, substitution, pruning = (
        tables.methods("", tables.by_seed(two)).markdown().splitlines()
    )
    assert header.startswith("| model | parameters | steps | operations of training (T) |")
    assert original.endswith("| 50.000 |  | 0.400 (0.370 to 0.430) |")
    assert "| 1,000 | 10 | 2.00 | 56.500 ± 0.707 | 1.000 |" in substitution
    assert substitution.endswith("| 0.310 (0.280 to 0.340) |")
    assert "| 60.500 ± 0.707 | 2.500 ± 0.707 |" in pruning


def test_differences_are_paired_by_seed(two):
    said = tables.methods_in_words(tables.by_seed(two))
    assert said == (
        "Substitution less L1 pruning, fine-tuned: perplexity −4.000 ± 1.000, "
        "likelihoods apart (nats) −1.500 ± 0.500."
    )


def test_a_later_result_takes_the_place_of_a_stage(two, tmp_path):
    longer = [
        run(tmp_path / f"longer-{seed}", seed, teacher=score(50.0, 0.4), prune=score(40.0, 0.2, 0))
        for seed in (0, 1)
    ]
    runs = tables.by_seed(two, longer)
    assert [each["prune"]["perplexity"] for each in runs] == [40.0, 40.0]
    assert [each["substitute"]["perplexity"] for each in runs] == [57.0, 56.0]


def test_what_is_kept_does_not_name_the_machine(two):
    assert "model" not in two[0]["scores"]["perplexity"]["prune"]
    assert "seconds" not in two[0]["scores"]["perplexity"]["prune"]


def test_runs_that_were_not_scored_of_all_stages_have_nothing(tmp_path):
    assert tables.read_scores(tmp_path) == {}
    write(tmp_path, teacher=score(50.0, 0.4))
    assert tables.read_scores(tmp_path)
    (tmp_path / "hellaswag.json").write_text(json.dumps({"acc": 0.3}))
    assert tables.read_scores(tmp_path) == {}
