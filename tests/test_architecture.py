"""Tests of who may know whom, read off the source."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedseg
from fedseg.bundle.configs import inference_config
from fedseg.bundle.source import copy_code
from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan

PACKAGE = Path(fedseg.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    ("errors", "logs"),
    ("registry",),
    ("sections",),
    ("privacy_section",),
    ("config",),
    ("site_config",),
    ("arrays", "peers", "receipts"),
    ("messages",),
    ("greeting",),
    ("data",),
    ("segmentation",),
    ("privacy",),
    ("federation",),
    ("report",),
    ("bundle",),
    ("commands",),
    ("site_work",),
    ("client_app", "server_app", "cli"),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
FREE_OF_FLOWER = (
    "errors",
    "logs",
    "registry",
    "sections",
    "privacy_section",
    "config",
    "site_config",
    "data",
    "segmentation",
    "privacy",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """`fedseg.data.cache` is in the room `data`, `fedseg.config` in `config`."""
    return module.split(".")[1] if "." in module else ""


MODULES = {module_name(path): path for path in FILES}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Every imported module, also inside functions and for types only."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            yield node.module
            # `from fedseg import config` and `from fedseg.data import cache` import modules, too.
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}" in MODULES
            )


def calls(module: str) -> Iterator[tuple[str, set[str], ast.Call]]:
    """Every call as dotted name and keywords."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg or "**" for k in node.keywords}, node


def test_every_module_is_in_a_room() -> None:
    assert len(FILES) > 30
    assert {room(module) for module in MODULES} - {""} == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    here = room(module)
    if not here:
        return
    for imported in imports(module):
        there = room(imported) if imported.startswith("fedseg.") else ""
        if there and there != here:
            assert RANK[there] < RANK[here], f"{module} imports {imported}"


def test_no_cycle_between_modules() -> None:
    graph = {m: {i for i in imports(m) if i in MODULES and i != "fedseg"} - {m} for m in MODULES}
    while True:
        leaves = {module for module, wanted in graph.items() if not wanted}
        if not leaves:
            break
        graph = {m: wanted - leaves for m, wanted in graph.items() if m not in leaves}
    assert graph == {}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in FREE_OF_FLOWER])
def test_library_knows_nothing_of_flower(module: str) -> None:
    for imported in imports(module):
        assert imported.split(".")[0] not in ("flwr", "ray"), f"{module} imports {imported}"
        assert imported != "fedseg.messages", f"{module} imports {imported}"


def test_library_runs_where_flower_cannot_be_imported() -> None:
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'flwr' or name.startswith('flwr.'):\n"
        "            raise ImportError(name)\n"
        "import fedseg\n"
        "sys.meta_path.insert(0, Nothing())\n"
        f"for name in {[m for m in MODULES if room(m) in ('data', 'segmentation', 'cli')]!r}:\n"
        "    __import__(name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


BANNED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
"""Modules that run what they read, or whose usual call does."""

ROOT = PACKAGE.parent
WHOLE_CODE = [
    p for d in ("fedseg", "fedseg_weights", "benchmarks") for p in (ROOT / d).rglob("*.py")
]


def unpickling(code: str) -> list[str]:
    """What in a piece of code may run or unpickle what it reads."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in BANNED]
            # By another name a call isn't recognised below.
            known = {"torch": None, "numpy": "np"}
            found += [
                a.name for a in node.names if a.asname not in (None, known.get(a.name, a.asname))
            ]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in BANNED:
                found.append(node.module)
            # By its bare name a call isn't recognised below.
            clear = node.module.split(".")[0] in ("torch", "numpy", "builtins", "os")
            found += [a.name for a in node.names if clear and a.name in ("load", "eval", "system")]
        elif isinstance(node, ast.Call):
            found += unpickling_call(node)
    return found


def unpickling_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    options = {k.arg: ast.unparse(k.value) for k in call.keywords}
    bad = (
        name in ("eval", "exec", "compile", "__import__", "os.system")
        or name.endswith(".read_pickle")
        or (name == "torch.load" and options.get("weights_only") != "True")
        or (name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False")
        or options.get("weights_only", "True") != "True"
        or options.get("allow_pickle", "False") != "False"
        or "pickle_module" in options
        or options.get("shell", "False") != "False"
    )
    return [ast.unparse(call)] if bad else []


@pytest.mark.parametrize("path", WHOLE_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert unpickling(path.read_text(encoding="utf-8")) == []


def test_code_that_an_export_writes_unpickles_nothing(tmp_path: Path) -> None:
    """What runs where FedSeg isn't installed: copied modules, and the lines of its config."""
    for name in copy_code(tmp_path / "scripts"):
        assert unpickling((tmp_path / "scripts" / f"{name}.py").read_text(encoding="utf-8")) == []
    plan = make_plan(StudyConfig.from_run_config({}))
    expressions = list(texts_of(inference_config(plan, modality="ct")))
    assert any(text.startswith("$") for text in expressions)
    for text in expressions:
        if text.startswith("$"):
            assert unpickling(re.sub("[@%]", "", text[1:]).replace("::", ".")) == []


def texts_of(value: object) -> Iterator[str]:
    """All texts of a JSON, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_of(part)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import marshal",
        "from torch import load",
        "import torch as t\nt.load(path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=given)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.lib.format.read_array(file, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_unpickling_is_noticed(code: str) -> None:
    assert unpickling(code) != []


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_for_and_what_it_offers(module: str) -> None:
    assert ast.get_docstring(tree(module)), f"{module} has no docstring"
    if MODULES[module].name == "__init__.py" and module != "fedseg":
        assert len(tree(module).body) == 1  # rooms import nothing
        return
    loaded = importlib.import_module(module)
    names = loaded.__all__
    assert len(names) == len(set(names)) > 0
    for name in names:
        assert hasattr(loaded, name), f"{module}.{name}"
        defined = getattr(getattr(loaded, name), "__module__", module)
        if str(defined).startswith("fedseg"):
            assert defined == module, f"{module}.{name} is at home in {defined}"


@pytest.mark.parametrize("module", [m for m in MODULES if MODULES[m].name != "__init__.py"])
def test_no_module_outgrows_one_concept(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 330
