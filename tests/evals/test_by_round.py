from etils import epath

from kd_jax.evals import pictures, tables


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
    assert len(table.header) == sum(width for _, width in table.spans) + table.labels
    assert table.rows[0][:3] == ["1", "1", "1,000"]
    assert table.rows[0][3:] == [
        *("1.4000 ± 0.1414", "0.4000 ± 0.1414", "0.6000 ± 0.1414"),
        *("1.4000 ± 0.1414", "0.8000 ± 0.2828"),
    ]
    assert [row[0] for row in table.rows] == ["1", "2"]
    assert tables.by_round("x", [{"stages": {}}]) is None


def test_what_is_said_of_the_rounds():
    said = tables.rounds_in_words([run(0.5, 0.3, 0.25), run(0.3, 0.2, 0.15, slope=3.0)])
    assert "round 3 less round 1: −0.2000 ± 0.0500 nats a token" in said
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
    assert pictures.trend([1, 2, 3], [2.0, None, 1.5]) is None
