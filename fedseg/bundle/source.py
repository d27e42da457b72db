"""The code of a bundle: FedSeg's own modules, copied, with their imports turned to each other."""

import importlib.util
import inspect
import re
from pathlib import Path

from fedseg.segmentation import training

__all__ = ["copy_code"]

_IMPORT = re.compile(r"^from (fedseg(?:\.\w+)*) import", re.MULTILINE)

_STAND_INS = ("fedseg.data.plan", "fedseg.data.volumes")

_DTYPE = '''"""Number format of the forward pass, as FedSeg chooses it."""

import functools
from pathlib import Path

import torch


'''


def copy_code(folder: Path, start: str = "fedseg.bundle.transforms") -> list[str]:
    """Copy a module and all of FedSeg that it needs, so that they import each other from there.

    Args:
        folder: `scripts/` of a bundle; made here.
        start: The module that inference.json names.

    Returns:
        Names of the files.
    """
    folder.mkdir()
    (folder / "__init__.py").write_text('"""Code of this bundle."""\n', encoding="utf-8")
    parts = (training.choose_dtype, training._cpu_has)
    texts = {"training": _DTYPE + "\n\n".join(inspect.getsource(part) for part in parts)}
    waiting = [start, "fedseg.bundle.stand_ins"]
    while waiting:
        module = waiting.pop()
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None, module
        text = Path(found.origin).read_text(encoding="utf-8")
        name = module.rpartition(".")[2]
        texts[name] = _IMPORT.sub(lambda match: f"from scripts.{_home(match[1])} import", text)
        needed = {used for used in _IMPORT.findall(text) if _home(used) not in texts}
        waiting += sorted(needed - set(_STAND_INS) - set(waiting))
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return sorted(texts)


def _home(module: str) -> str:
    """Where a module's names are in the bundle."""
    return "stand_ins" if module in _STAND_INS else module.rpartition(".")[2]
