import json

import pytest
from etils import epath

from kd_jax.report import pictures, tables


def run(*kls, slope=1.0):
    """Results of a run whose ensemble has these KLs after its rounds."""
    made = []
    for number, kl in enumerate(kls, 1):
        figures = {"loss": 1 + kl, "kl": kl, "agreement": 1 - kl}
        size = {"parameters": 1000 * number}
        alone = figures | {"kl": 2 * kl}
        made.append(
            {"round": number, "members": number, "ensemble": figures | size, "student": alone}
        )
    fitted = {"limit": 0.25, "limit_error": 0.01, "slope": slope, "slope_error": 0.02}
    return {"rounds": made, "trend": {"kl": fitted, "loss": fitted} if len(kls) > 2 else {}}


def test_a_row_a_round_with_means_over_the_seeds():
    table = tables.by_round("qwen", [run(0.5, 0.25), run(0.3, 0.15)])
    assert table.title == "qwen: rounds, 2 seeds: mean ± standard deviation"
    assert table.header[3:] == [
        *("all members loss", "all members KL to teacher", "all members top-1 agreement"),
        *("last member alone loss", "last member alone KL to teacher"),
    ]
    assert table.rows[0][:3] == ["1", "1", "1,000"]
    assert table.rows[0][3:] == [
        *("1.4000 ± 0.1414", "0.4000 ± 0.1414", "0.6000 ± 0.1414"),
        *("1.4000 ± 0.1414", "0.8000 ± 0.2828"),
    ]
    assert [row[0] for row in table.rows] == ["1", "2"]
    assert tables.by_round("x", [{"stages": {}}]) is None


def test_what_is_said_of_the_rounds():
    said = tables.rounds_in_words([run(0.5, 0.3, 0.25), run(0.3, 0.2, 0.15, slope=3.0)])
    assert "round 3 − round 1: −0.2000 ± 0.0500 nats a token" in said
    assert "KL of n members, fitted: 0.2500 ± 0.0100 + (2.0000 ± 0.0200) / n." in said
    assert "fitted" not in tables.rounds_in_words([run(0.5, 0.25)])
    assert tables.rounds_in_words([run(0.5)]) == ""


def ended(seed, kl, steps=10):
    figures = {"loss": 1 + kl, "kl": kl, "agreement": 1 - kl, "parameters": 1000, "steps": steps}
    whole = figures | {"training_flops": 2.5e12}
    return {"seed": seed, "rounds": [{"members": 2}], "stages": {"ensemble": whole}}


def test_the_ends_of_several_configurations():
    groups = {
        "five": [ended(0, 0.5), ended(1, 0.3)],
        "one": [ended(1, 0.1), ended(0, 0.2), ended(7, 0.9)],  # no pair for the last seed
    }
    first, other = tables.ensembles(groups).rows
    assert first[:5] == ["five", "2", "1,000", "10", "2.50"]
    assert first[5:] == ["1.4000 ± 0.1414", "0.4000 ± 0.1414", "0.6000 ± 0.1414", ""]
    assert other[-1] == "−0.2500 ± 0.0500"


def test_a_figure_that_is_missing_ends_nothing(tmp_path):
    def one(number, loss):
        figures = {"loss": loss, "kl": None, "perplexity": 9.0, "agreement": 0.5, "parameters": 10}
        both = {"ensemble": figures, "student": figures}
        return {"round": number, "members": number, "minutes": 1.0, **both}

    found = [one(1, 2.0), one(2, None), one(3, 1.5)]
    pictures.write_rounds(epath.Path(tmp_path), {"loss": None, "perplexity": None}, found)
    rows = (tmp_path / "rounds.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows[1:]] == ["2.0", "", "1.5"]
    assert [row.split(",")[-1] for row in rows[1:]] == ["", "", ""]
    assert pictures.trend([1, 2, 3], [2.0, None, 1.5]) == {}
    fit = pictures.trend([1, 2, 4], [3.0, 2.0, 1.5])
    assert (fit["limit"], fit["slope"]) == pytest.approx((1.0, 2.0))
    assert max(fit["limit_error"], fit["slope_error"]) < 1e-6


def score(perplexity, acc, apart=None):
    beside = {"beside_teacher": {"mean_difference": apart}} if apart is not None else {}
    interval = [acc - 0.03, acc + 0.03]
    return (
        {"model": "runs/x", "seconds": 3.0, "perplexity": perplexity, "parameters": 1000},
        {"model": "runs/x", "acc": acc, "acc_interval": interval} | beside,
    )


def write_scores(folder, **stages):
    folder.mkdir(exist_ok=True)
    for i, task in enumerate(tables.SCORED):
        found = {stage: figures[i] for stage, figures in stages.items()}
        (folder / f"{task}.json").write_text(json.dumps({"stages": found}))


def scored(folder, seed, **stages):
    write_scores(folder, **stages)
    effort = {stage: {"steps": 10 + seed, "training_flops": 2e12} for stage in stages}
    return {"seed": seed, "stages": effort, "scores": tables.read_scores(folder)}


@pytest.fixture
def two(tmp_path):
    """Two seeds; substitution is 3 and 5 below pruning."""
    teacher = score(50.0, 0.4)
    return [
        scored(
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
    assert header.startswith("| model | parameters | steps | FLOPs of training (T) |")
    assert original.endswith("| 50.000 | - | 0.400 (0.370 to 0.430) |")
    assert "| 1,000 | 10 ± 1 | 2.00 | 56.500 ± 0.707 | 1.000 |" in substitution
    assert substitution.endswith("| 0.310 (0.280 to 0.340) |")
    assert "| 60.500 ± 0.707 | 2.500 ± 0.707 |" in pruning


def test_differences_are_paired_by_seed(two):
    said = tables.methods_in_words(tables.by_seed(two))
    assert said == (
        "substitute − prune: perplexity −4.000 ± 1.000, "
        "absolute Δ log-likelihood (nats) −1.500 ± 0.500."
    )


def test_a_later_result_takes_the_place_of_a_stage(two, tmp_path):
    longer = [
        scored(
            tmp_path / f"longer-{seed}", seed, teacher=score(50.0, 0.4), prune=score(40.0, 0.2, 0)
        )
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
    write_scores(tmp_path, teacher=score(50.0, 0.4))
    assert tables.read_scores(tmp_path)
    (tmp_path / "hellaswag.json").write_text(json.dumps({"acc": 0.3}))
    assert tables.read_scores(tmp_path) == {}


ACC = {"acc": 0.27, "acc_error": 0.014, "acc_interval": [0.2434, 0.2984]}


def test_accuracies_have_errors_and_intervals():
    found = ACC | {"chance": 0.25, "questions": 1000, "truncated": 0}
    found["groups"] = {"NE": {"questions": 2, "acc": 0.5, "acc_error": 0.25} | {
        "acc_interval": [0.1, 0.9]
    }}  # fmt: skip
    table = tables.scores({"gpt2": found}, "title")
    assert table.header == ["", "gpt2"] and table.title == "title"
    assert table.rows == [
        ["acc", "0.2700 ± 0.0140 (0.2434 to 0.2984)"],
        ["NE: acc", "0.5000 ± 0.2500 (0.1000 to 0.9000)"],
        ["chance", "0.2500"],
        ["questions", "1,000"],
        ["endings whose context was cut", "0"],
    ]


def test_perplexity_needs_no_intervals():
    found = {"loss": 1.5, "perplexity": 4.4817, "tokens": 12345}
    assert tables.scores({"m": found}, "").rows == [
        ["loss (nats/token)", "1.5000"],
        ["perplexity, a token", "4.482"],
        ["tokens scored", "12,345"],
    ]


def test_several_models_stand_beside_the_teacher():
    kept = dict(mean_difference=0.25, mean_difference_error=0.01, acc_retention=None)
    found = {"teacher": ACC, "prune": ACC | {"beside_teacher": kept | {"acc_norm_retention": 0.9}}}
    table = tables.scores(found, "title")
    assert table.header == ["", "teacher", "prune"]
    assert table.rows == [
        ["acc", *["0.2700 ± 0.0140 (0.2434 to 0.2984)"] * 2],
        ["mean |difference| of log-likelihoods", "-", "0.2500 ± 0.0100"],
        ["acc_norm, of the teacher's", "-", "90.0%"],
    ]
