from kd_jax.evals import tables

ACC = {"acc": 0.27, "acc_error": 0.014, "acc_interval": [0.2434, 0.2984]}


def test_accuracies_have_errors_and_intervals():
    found = ACC | {"chance": 0.25, "questions": 1000, "truncated": 0}
    found["groups"] = {"NE": {"questions": 2, "acc": 0.5, "acc_error": 0.25} | {
        "acc_interval": [0.1, 0.9]
    }}  # fmt: skip
    table = tables.scores(found, "gpt2", "title")
    assert table.header == ["", "gpt2", "95% interval"] and table.title == "title"
    assert table.rows == [
        ["acc", "0.2700 ± 0.0140", "0.2434 to 0.2984"],
        ["NE: acc", "0.5000 ± 0.2500", "0.1000 to 0.9000"],
        ["chance", "0.2500", ""],
        ["questions", "1,000", ""],
        ["endings whose context was cut", "0", ""],
    ]


def test_perplexity_needs_no_intervals():
    table = tables.scores({"loss": 1.5, "perplexity": 4.4817, "tokens": 12345}, "m", "")
    assert table.header == ["", "m"]
    assert table.rows == [
        ["loss (nats/token)", "1.5000"],
        ["perplexity, a token", "4.482"],
        ["tokens scored", "12,345"],
    ]


def test_several_models_stand_beside_the_teacher():
    kept = dict(mean_difference=0.25, mean_difference_error=0.01, acc_retention=None)
    found = {"teacher": ACC, "prune": ACC | {"beside_teacher": kept | {"acc_norm_retention": 0.9}}}
    table = tables.scores_of_models(found, "title")
    assert table.header == ["", "teacher", "prune"]
    assert table.rows == [
        ["acc", "0.2700 ± 0.0140", "0.2700 ± 0.0140"],
        ["mean |difference| of log-likelihoods", "-", "0.2500 ± 0.0100"],
        ["acc_norm, of the teacher's", "-", "90.0%"],
    ]
