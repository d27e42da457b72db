"""Tests of who may know whom, read off the source."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedseg

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
    ("data",),
    ("segmentation",),
    ("privacy",),
    ("federation",),
    ("report",),
    ("bundle",),
    ("commands",),
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


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled_or_evaluated(module: str) -> None:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
    assert not banned & {imported.split(".")[0] for imported in imports(module)}
    for name, keywords, call in calls(module):
        assert name not in ("eval", "exec", "__import__", "os.system"), f"{module}: {name}"
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True", f"{module}: {ast.unparse(call)}"
        if name in ("np.load", "numpy.load"):
            assert options.get("allow_pickle") == "False", f"{module}: {ast.unparse(call)}"
        assert options.get("shell") != "True" or "shell" not in keywords


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
