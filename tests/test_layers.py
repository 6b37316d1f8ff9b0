"""The shape of the code itself: which way imports go, how long files are, what they name."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kd_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Every top-level part of kd_jax and its layer. Imports go to lower layers, or stay in their part;
# the single files of layer 0 may import each other.
LAYER = {
    **dict.fromkeys("errors axes types tensors plugins precision bisection".split(), 0),
    **dict.fromkeys("ranges schedules storage hub".split(), 0),
    **dict.fromkeys("config sections experiments keys".split(), 0),
    **dict.fromkeys("models objectives data metrics plans report".split(), 1),
    **dict.fromkeys("tasks teachers train".split(), 2),
    **dict.fromkeys("run smoke".split(), 3),
    "stages": 4,
    **dict.fromkeys("recipes cli flags".split(), 5),
    **dict.fromkeys(
        "__main__ api main embed evaluate export compare generate plan predict".split(), 6
    ),
}
# A module that defines one of these is a plug-in: reached by name, through kd_jax.plugins.
PLUGIN_MARKS = {"FAMILY", "make", "run"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(source: str) -> set[str]:
    """The kd_jax modules that `source` imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer: name the module whole"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return {name for name in found if name.split(".")[0] == "kd_jax"}


def is_plugin(module: str) -> bool:
    defined = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign):
            defined.add(node.target.id)
    return bool(defined & PLUGIN_MARKS)


def complaint(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None."""
    part, other = module.split(".")[1], imported.split(".")[1]
    if part == other or LAYER[part] == LAYER[other] == 0:
        return None
    if LAYER[part] <= LAYER[other]:
        return f"{module} imports {imported}: {other} is no lower layer than {part}"
    if part == "train" and is_plugin(imported):
        return f"{module} imports {imported}: train sees protocols, plug-ins are wired by run"
    return None


def test_every_part_has_a_layer():
    parts = {name.split(".")[1] for name in MODULES if "." in name}
    assert parts <= LAYER.keys(), "new part of kd_jax: give it a layer in this test"


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_imports_go_down(module):
    found = imports(MODULES[module].read_text()) - {"kd_jax"}
    complaints = [complaint(module, imported) for imported in sorted(found)]
    assert not [text for text in complaints if text]


def test_the_package_offers_its_api_alone():
    assert imports(MODULES["kd_jax"].read_text()) == {"kd_jax.api"}


def test_the_check_sees_what_it_forbids():
    assert imports("def f():\n    from kd_jax.models import layers") == {"kd_jax.models.layers"}
    assert complaint("kd_jax.models.layers", "kd_jax.report.plots")
    assert complaint("kd_jax.train.step", "kd_jax.recipes.export")
    assert complaint("kd_jax.train.step", "kd_jax.models.bert")
    assert not complaint("kd_jax.train.step", "kd_jax.precision")
    assert complaint("kd_jax.run.run", "kd_jax.stages.plain")
    assert not complaint("kd_jax.recipes.distil", "kd_jax.recipes.export")


PYTHON_FILES = sorted(
    path
    for folder in ("kd_jax", "configs", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def test_a_wheel_has_every_package():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(stated) == there | {"kd_jax.configs"}


def test_a_wheel_has_the_files_that_are_no_python():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, names in setuptools["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        there = {path for path in folder.iterdir() if path.suffix not in (".py", "")}
        assert there <= {path for name in names for path in folder.glob(name)}


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    # The package is to become smaller: these numbers go down, and up only with what it can do.
    assert sum(lengths.values()) < 34_760 and len(lengths) <= 224
    assert sum(n for name, n in lengths.items() if name.startswith("kd_jax/recipes/")) < 2_850


def test_the_path_of_a_run_is_short():
    """The files that README names to read are those that it says, and take no hour."""
    readme = (ROOT / "README.md").read_text().partition("## Reading the code")[2]
    named = re.findall(r"`((?:kd_jax/)?\w+(?:/\w+)?\.py)`", readme.partition("are the path")[0])
    path = [PACKAGE / name.removeprefix("kd_jax/") for name in named]
    assert len(path) == 8
    assert sum(len(file.read_text().splitlines()) for file in path) <= 1_500


def test_no_utils():
    assert [name for name in MODULES if "util" in name] == []


MACHINE_PATH = re.compile(r"(?<![\w.}~-])/(root|work|opt|tmp|home(?!/me)|Users)/\w")
TEXTS = PYTHON_FILES + [
    path
    for pattern in ("*.md", "*.toml", ".ci/run", "launch/*")
    for path in sorted(ROOT.glob(pattern))
]


def test_no_paths_of_one_machine():
    assert MACHINE_PATH.search('open("/work/main/x")')
    assert not MACHINE_PATH.search("kd_jax/work/x.py and $HOME/work/x and gs://bucket/work/x")
    found = []
    for path in TEXTS:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if MACHINE_PATH.search(line) and path != Path(__file__).resolve():
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
