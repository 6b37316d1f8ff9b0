import json

import pytest

from kd_jax import plan as command
from kd_jax.recipes import plan as recipe
from kd_jax.report import plan

FOUND = {
    "stage": "student",
    "params_teacher": 335_174_458,
    "params_student": 108_393_786,
    "reduction_percent": 67.66,
    "rows": 512,
    "tokens": 512,
    "positions": 80,
    "flops_needed": 4 * 10**14,
    "gradient_bytes": 433_575_144,
    "steps": 10_000,
    "total_tokens": 2_621_440_000,
    "total_flops": 4 * 10**18,
    "memory_estimate": {"weights": 434_000_000, "activations": 9_000_000_000},
    "chunk": {"rows": 854, "bytes": 312_700_000},
}
STEP = {
    "topology": "v5e:4x4",
    "flops_compiled": 404 * 10**12,
    "memory_bytes_per_device": 10 * 10**9,
    "memory_parts": {"arguments": 3e9, "temporaries": 7e9, "outputs": 1.5e9, "aliased": 1.5e9},
    "memory_bytes_of_chip": 2**34,
    "collective_bytes": {"all-reduce": 433_575_160},
    "unbounded_loops": [],
    "memory_by_kind": {"weights": 434_000_000, "logits": 200_000_000},
    "largest": [{"shape": "f32[8,9]", "bytes": 200_000_000, "kind": "logits", "made_by": "dot"}],
    "compile_seconds": 200.1,
    "compile_cpu_seconds": 350.1,
}


def rows(found):
    return {row[0]: row[1] for row in plan.table(found).rows}


def test_table_without_topology():
    assert rows(FOUND) == {
        "teacher": "335,174,458 parameters",
        "student": "108,393,786 parameters",
        "reduction": "67.66%",
        "batch": "512 x 512 tokens, 80 to the head",
        "FLOPs needed a step": "4e+14",
        "altogether": "10,000 steps, 2.62e+09 tokens, 4e+18 FLOPs",
        "rows with logits at a time": "854 a device",
    }


def test_table_of_memory():
    assert plan.memory_table(FOUND).rows == [
        ["weights", "0.434"],
        ["activations", "9.000"],
        ["all", "9.434"],
    ]
    assert plan.memory_table(FOUND | STEP).rows == [
        ["weights", "0.434", "0.434"],
        ["activations", "9.000", ""],
        ["logits", "", "0.200"],
        ["all", "9.434", "0.634"],
        ["logits f32[8,9]", "", "0.200"],
    ]


def test_table_with_topology():
    found = rows(FOUND | STEP)
    assert found["FLOPs compiled"] == "4.04e+14, 1.010 of those needed"
    parts = "arguments 3.00, temporaries 7.00, outputs 1.50, aliased 1.50"
    assert found["memory a chip"] == f"10.00 GB ({parts}), 58%: fits"
    assert found["all-reduce"] == "0.434 GB a chip, 1.000 of the gradients'"
    assert "loops counted once" not in found
    found = rows(FOUND | STEP | {"memory_bytes_per_device": 2**35, "unbounded_loops": ["while.1"]})
    assert found["memory a chip"].endswith("200%: does not fit")
    assert found["loops counted once"] == "while.1"


@pytest.fixture
def refused(capsys):
    """Runs kd_jax.plan in this process, which prints no table and ends with status 1 and a line."""

    def of(*flags):
        with pytest.raises(SystemExit) as ended:
            command.main(["--config=configs/quickstart.py:smoke", *flags])
        shown = capsys.readouterr()
        assert ended.value.code == 1 and not shown.out
        (line,) = shown.err.splitlines()
        return line

    return of


def test_command(tmp_path, capsys):
    command.main(["--config=configs/quickstart.py:smoke", f"--json={tmp_path / 'plan.json'}"])
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [each["stage"] for each in found["stages"]] == ["teacher", "baseline", "student"]
    for each in found["stages"]:
        assert f"{each['params_student']:,} parameters" in shown
        assert set(each) == set(FOUND)
    assert found["total"]["total_flops"] == sum(each["total_flops"] for each in found["stages"])


def test_a_file_that_could_not_be_written_is_found_first(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "plan", None)  # the table has not been made
    line = refused(f"--json={tmp_path / 'none' / 'plan.json'}")
    assert line.startswith(f"error: --json={tmp_path}/none/plan.json: there")


def test_a_share_is_above_0_and_up_to_1(refused):
    assert "--mfu" in refused("--mfu=1.5")


def test_a_mistake_is_one_line(refused):
    line = refused("--topology=v9:4x4")
    assert line.startswith("error: unknown topology 'v9:4x4'; have: v5e:")
