"""Finished `:smoke` runs, each made once a session for all test processes, and the keys of the
config it has read."""

import collections
import contextlib
import dataclasses
import functools
import importlib
import os
import pickle
from pathlib import Path
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from kd_jax import config as defaults
from kd_jax import plugins, storage
from kd_jax.data.loader import lengths_of
from kd_jax.metrics import cost
from kd_jax.report import plots
from kd_jax.run import text_logits, workdir
from kd_jax.stages import round
from kd_jax.tasks import task
from kd_jax.train import loop, passes, sharding, step

# As they are, whatever stands in their places in passes.
from kd_jax.train.passes import eval_step, log_probs_step

_SESSION = Path(os.environ["KD_JAX_TESTS"])  # conftest.py


@dataclasses.dataclass(frozen=True)
class Smoke:
    folder: Path
    config: ConfigDict
    results: dict
    keys: set[str]  # of every leaf of the config: "optim.schedule.warmup"
    read: set[str]  # those that something looked at
    compiled: dict[str, int]  # how often each program was compiled, or read from the cache


def masked() -> ConfigDict:
    """A masked LM with a teacher that is trained first."""
    config = importlib.import_module("configs.pretrain_wikitext").get_config("smoke")
    config.stages = {"teacher": {}, "baseline": {}, "student": {}}
    return config


@functools.cache
def run(name: str) -> Smoke:
    """configs/NAME.py:VARIANT as "NAME:VARIANT" (alone: smoke), or `masked`, from the start to the
    printed table."""
    if name != "masked" and ":" not in name:
        return run(f"{name}:smoke")
    folder = _SESSION / name.replace(":", "-")
    finished = folder.with_suffix(".pickle")
    with storage.lock(folder.with_suffix(".lock")):  # another process may be making it
        if not finished.exists():
            finished.write_bytes(pickle.dumps(_made(name, folder)))
    return pickle.loads(finished.read_bytes())


def _made(name: str, folder: Path) -> Smoke:
    file, _, variant = name.partition(":")
    if name == "masked":
        config = masked()
    else:
        config = importlib.import_module(f"configs.{file}").get_config(variant)
    if name not in ON_ALL:
        lighten(config)
    with (
        private_caches(),
        Reads(config) as reads,
        compilations() as compiled,
        guards(),
        sketches(name),
        few_calls(0 if name not in ON_ALL else 2),
        one_length(name),
        few_devices(name),
    ):
        recipe = plugins.load("recipes", config.recipe, "run")
        with workdir.enter(config, file, str(folder)) as place:
            results = recipe.run(config, place)
    return Smoke(folder, config, results, reads.keys, reads.seen, compiled)


# Fine-tuned in batches of several lengths, each of which is compiled for every model; all others in
# batches of the longest one.
LENGTHS = {"finetune_agnews:smoke"}


def one_length(name: str):
    longest = mock.patch.object(task, "lengths_of", lambda *given: lengths_of(*given)[-1:])
    return contextlib.nullcontext() if name in LENGTHS else longest


# One of each recipe and kind of stage, and those whose figures are measured again, whole and on all
# devices; the others, which differ from these in models and data, on one, without stages to compare
# with.
ON_ALL = {f"{name}:smoke" for name in ("pretrain_wikitext", "finetune_agnews", "finetune_squad")}
ON_ALL |= {f"{name}:smoke" for name in ("substitute_gpt2", "ensemble_stories", "embedding_minilm")}
ON_ALL |= {f"{name}:smoke" for name in ("distil_chat", "onpolicy_stories", "sequence_stories")}
ON_ALL |= {"masked", "small_gpt2:smoke", "finetune_sst2:smoke"}


def lighten(config: ConfigDict) -> None:
    """Leaves out the stages that a run's own one is compared with, which other runs have, and
    replaces both blocks of a model at once."""
    stages, compared = config.get("stages", {}), {"baseline"}
    if "substitute" in stages:
        compared |= {"student", "prune"}
        config.substitution.blocks = 2
    for stage in compared & {*stages}:
        del stages[stage]


def few_devices(name: str):
    """Makes meshes of one device, for a run that is not to show what eight do."""
    if name in ON_ALL:
        return contextlib.nullcontext()
    make = sharding.make_mesh
    few = lambda fsdp=1, devices=None, model=1: make(fsdp, devices or jax.devices()[:1], model)  # noqa: E731
    return mock.patch.object(sharding, "make_mesh", few)


@contextlib.contextmanager
def sketches(name: str):
    """Draws pictures without moving their pieces about until none overlap, half of the work; none
    on the sheets of runs whose pictures show nothing of their own."""
    figure = plots.Figure
    sheet = plots.sheet if name in ON_ALL else lambda *given, **more: figure(figsize=(1, 1))
    with (
        mock.patch.object(plots, "Figure", lambda layout=None, **given: figure(**given)),
        mock.patch.object(plots, "sheet", sheet),
    ):
        yield


@contextlib.contextmanager
def few_calls(count: int):
    """Times models by so many calls; by none, it says a second. The figures are not compared."""
    times = cost.times

    def few(call, repeats, budget_s):
        return times(call, 0, budget_s) if count else [1.0, 1.0]

    with (
        mock.patch.multiple(cost, WARM_UP=0, FEWEST=count),
        mock.patch.object(cost, "times", few),
    ):
        yield


@contextlib.contextmanager
def guards():
    """Steps find their arguments on the devices: nothing is sent there in silence."""

    def guarded(function):
        def call(*args, **kwargs):
            with jax.transfer_guard("disallow"):
                return function(*args, **kwargs)

        return call

    steps = (loop, "train_step"), (passes, "eval_step"), (passes, "predict_step")
    with contextlib.ExitStack() as stack:
        for module, name in (*steps, (text_logits, "log_probs_step"), (round, "_slope")):
            new = guarded(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, new))
        yield


@contextlib.contextmanager
def private_caches():
    """Tokens and compiled programs are kept for this session, and shared by its processes."""
    folder = _SESSION / "cache"
    options = {
        "jax_compilation_cache_dir": str(folder / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # there are many small ones
    }
    before = {name: getattr(jax.config, name) for name in options}
    with mock.patch.dict(os.environ, KD_JAX_CACHE=str(folder)):
        _configure(options)
        try:
            yield
        finally:
            _configure(before)


def _configure(options: dict) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def compilations():
    """Counts the programs that are compiled, by name, none of the steps being there before."""
    found = collections.Counter()

    def note(event: str, seconds: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found[details["fun_name"]] += 1

    for program in (step.train_step, eval_step, log_probs_step):
        program.clear_cache()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


class Reads:
    """Notes which leaves of `config` are looked at while the context is open.

    A section that is turned into a plain dict by `items` counts as read whole, since what takes it
    refuses the keys that it does not know. `to_dict` does not count: the ConfigDict made from its
    result is watched instead. Writing the config down and checking it are no reading.
    """

    def __init__(self, config: ConfigDict):
        self.seen, self._paths, self._kept = set(), {}, []
        self._watch(config, "")
        self.keys = {
            f"{path}{key}"
            for section, path in list(self._kept)
            if isinstance(section, ConfigDict)  # a plain dict is one value
            for key, value in section.items()
            if not isinstance(value, ConfigDict)
        }

    def _watch(self, section, path: str) -> None:
        self._paths[id(section)] = path
        self._kept.append((section, path))  # ids stay taken
        for key, value in section.items():
            if isinstance(value, ConfigDict | dict):
                self._watch(value, f"{path}{key}.")

    def __enter__(self):
        self._off, self._patches = 0, contextlib.ExitStack()
        get, to_dict, init = ConfigDict.__getitem__, ConfigDict.to_dict, ConfigDict.__init__

        def read(section, key):
            value = get(section, key)
            path = self._paths.get(id(section))
            if path is not None and not self._off and not isinstance(value, ConfigDict):
                self.seen.add(f"{path}{key}")
            return value

        def copy(section, *args, **kwargs):
            with self._unnoticed():
                found = to_dict(section, *args, **kwargs)
                if id(section) in self._paths:
                    self._watch(found, self._paths[id(section)])
            return found

        def made(section, initial=None, *args, **kwargs):
            with self._unnoticed():
                init(section, initial, *args, **kwargs)
                if id(initial) in self._paths:
                    self._watch(section, self._paths[id(initial)])

        patches = {"__getitem__": read, "to_dict": copy, "__init__": made}
        for name, function in patches.items():
            self._patches.enter_context(mock.patch.object(ConfigDict, name, function))
        for owner, name in (
            (ConfigDict, "to_json"),
            (defaults, "check"),
            (defaults, "check_section"),
        ):
            quiet = self._quiet(getattr(owner, name))
            self._patches.enter_context(mock.patch.object(owner, name, quiet))
        return self

    def __exit__(self, *error):
        self._patches.close()

    @contextlib.contextmanager
    def _unnoticed(self):
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def _quiet(self, function):
        def call(*args, **kwargs):
            with self._unnoticed():
                return function(*args, **kwargs)

        return call
