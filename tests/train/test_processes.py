"""Two processes do what one does: the same batches, loss, gradient, parameters and figures."""

import os

import numpy as np
import pytest

from tests import forked
from tests.train import step_worker

WORKER = step_worker.__file__


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(results of one process on one device, results of each of two on two devices each)."""
    folder = tmp_path_factory.mktemp("processes")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [
        forked.start([f"--out={folder / str(i)}.npz", *each], folder, WORKER, **environment)
        for i, each in enumerate(forked.cluster())
    ]
    try:
        alone = step_worker.work(1, 1)
        for process in processes:
            assert process.wait() == 0, process.output() + process.error()
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return alone, [dict(np.load(folder / f"{i}.npz")) for i in range(2)]


def test_same_global_batches(runs):
    alone, two = runs
    ids = np.concatenate([found["local_ids"] for found in two], axis=1)
    np.testing.assert_array_equal(ids, alone["local_ids"])
    assert two[0]["local_ids"].shape == (4, 8)
    for found in two:
        for i in range(2):
            np.testing.assert_array_equal(found[f"global_ids {i}"], alone["local_ids"][i])


@pytest.mark.parametrize("fsdp", [2, 4])
def test_same_gradient(runs, fsdp):
    """Parameters split within each process (2), and over both (4)."""
    alone, two = runs
    wanted = {n.removeprefix("fsdp 1/"): x for n, x in alone.items() if n.startswith("fsdp 1/")}
    size = np.sqrt(sum(np.sum(x**2) for n, x in wanted.items() if n.startswith("gradient")))
    assert size > 0.1
    for found in two:
        for name, array in wanted.items():
            limit = 1e-5 * max(np.linalg.norm(array), 1e-3 * size * name.startswith("gradient"))
            assert np.linalg.norm(found[f"fsdp {fsdp}/{name}"] - array) <= limit, name


def test_same_loss_and_parameters_after_two_steps(runs):
    alone, two = runs
    for found in two:
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        for name in alone:
            if name.startswith("params"):
                np.testing.assert_allclose(
                    found[name], alone[name], rtol=1e-4, atol=1e-5, err_msg=name
                )


def test_same_held_out_figures(runs):
    alone, two = runs
    assert two[0]["held_out"] == two[1]["held_out"] == pytest.approx(alone["held_out"], rel=1e-5)
