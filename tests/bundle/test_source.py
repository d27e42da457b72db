"""The code that a bundle carries."""

import ast
import sys
from pathlib import Path

import pytest
from small_model import plan_of

from fedseg.bundle import stand_ins
from fedseg.bundle.source import copy_code
from fedseg.data.plan import Plan

STANDARD = {*sys.stdlib_module_names, "scripts", "torch", "monai", "numpy", "nibabel", "scipy"}


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    copy_code(tmp_path / "scripts")
    return tmp_path / "scripts"


def imports(path: Path) -> set[tuple[str, str]]:
    """Module and name of every `from module import name`; the name is `""` of an `import`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
    return found


def test_code_needs_only_what_the_bundle_requires(scripts: Path) -> None:
    for path in scripts.iterdir():
        assert {module.split(".")[0] for module, _ in imports(path)} <= STANDARD, path.name


def test_every_name_is_where_it_is_imported_from(scripts: Path) -> None:
    for path in scripts.iterdir():
        for module, name in imports(path):
            if module.startswith("scripts."):
                home = scripts / f"{module.partition('.')[2]}.py"
                tree = ast.parse(home.read_text())
                defined = {
                    n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)
                }
                for node in tree.body:
                    targets = node.targets if isinstance(node, ast.Assign) else []
                    defined |= {t.id for t in targets if isinstance(t, ast.Name)}
                    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                        defined.add(node.target.id)
                assert name in defined, f"{path.name}: {name} of {module}"


def test_stand_in_of_the_plan_has_its_values() -> None:
    plan = plan_of()
    copy = stand_ins.Plan(**plan.model_dump(mode="json"))
    for field in Plan.model_fields:
        assert getattr(copy, field) == getattr(plan, field), field


def test_stand_ins_say_the_same_numbers() -> None:
    from fedseg.data import plan, volumes

    assert stand_ins.CLASSES == plan.CLASSES
    assert stand_ins.MAX_VOXELS == volumes.MAX_VOXELS
