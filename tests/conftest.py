"""All tests run on the CPU, as on eight devices, and strictly."""

import gc
import logging
import os
import tempfile

# A folder for all test processes of a session, which the first of them makes and removes.
if "KD_JAX_TESTS" not in os.environ:
    _session = tempfile.TemporaryDirectory(prefix="kd_jax-tests-", ignore_cleanup_errors=True)
    os.environ["KD_JAX_TESTS"] = _session.name

# Before JAX is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# PyTorch's second thread would wait, spinning, for the core of the other test process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Code next to weights.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-", dir=os.environ["KD_JAX_TESTS"])

from pathlib import Path

import jax
import pytest

from kd_jax.cli import CPU_FLAGS
from tests import FAST

# Before JAX looks at its devices.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", CPU_FLAGS, FAST]
)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_cpu_enable_async_dispatch", False)


# Whose files take longest: they come first, so that no process is left with one at the end.
LONGEST = ("configs", "recipes", "stages", "benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files of tests by how long those of their folder take."""
    folders = [*LONGEST, *sorted({item.path.parent.name for item in items} - set(LONGEST))]
    items.sort(key=lambda item: folders.index(item.path.parent.name))


def pytest_collection_finish():
    """What has been imported stays: looking for garbage in it again and again takes a sixth of the
    time of a run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """The package's log goes to pytest alone, whatever a program that ran before has set up."""
    own = logging.getLogger("kd_jax")
    own.handlers, own.propagate = [], True


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data and tokenizers; tests that ask for it are skipped where KD_JAX_DATA is unset."""
    if "KD_JAX_DATA" not in os.environ:
        pytest.skip("KD_JAX_DATA is not set")
    return Path(os.environ["KD_JAX_DATA"])


@pytest.fixture(scope="session")
def stories_folder(data_folder) -> Path:
    """The checkpoint of a real trained Llama, stories260K."""
    folder = data_folder.parent / "models" / "stories260K"
    if not folder.exists():
        pytest.skip("no models/stories260K beside KD_JAX_DATA")
    return folder


@pytest.fixture(scope="module")
def caches():
    """Tokens and compiled programs are kept for the session (`smoke.private_caches`)."""
    from tests import smoke

    with smoke.private_caches():
        yield
