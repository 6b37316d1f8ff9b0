from kd_jax.evals.runs import differences


def config(seed=0, stages=("baseline", "student"), **objective):
    objective = {"kl": {"weight": 0.5, "temperature": 2.0}} | objective
    optim = {"learning_rate": 1e-3}
    return dict(seed=seed, objective=objective, stages={n: {} for n in stages}, optim=optim)


def test_values_are_told_with_the_end_of_their_key():
    other = config(1) | {"optim": {"learning_rate": 3e-4}}
    found = differences([config(), other])
    assert found == [["optim.learning_rate=0.001"], ["optim.learning_rate=0.0003"]]


def test_a_section_that_others_lack_is_named_once():
    hidden = {"weight": 1.0, "kind": "mse", "layers": "uniform"}
    found = differences([config(), config(hidden=hidden), config(stages=["teacher"])])
    trained = ["stages.baseline", "stages.student"]
    assert found == [trained, ["objective.hidden", *trained], ["stages.teacher"]]


def test_in_a_section_that_some_lack_the_others_may_differ():
    heavy, light = ({"hidden": {"weight": weight, "kind": "mse"}} for weight in (10, 1))
    found = differences([config(), config(**heavy), config(**light)])
    assert found == [[], ["hidden.weight=10"], ["hidden.weight=1"]]


def test_keys_with_the_same_end_are_told_whole():
    one, two = ({"a": {"x": {"lr": n}}, "b": {"x": {"lr": 2 * n}}} for n in (1, 2))
    assert differences([one, two])[0] == ["a.x.lr=1", "b.x.lr=2"]


def test_a_section_in_place_of_a_value():
    assert differences([{"a": ""}, {"a": {"b": 1}}]) == [['a=""'], ["a"]]
