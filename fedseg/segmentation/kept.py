"""What a site keeps between rounds, on its own disk: tensors in `round-N/<name>.safetensors`.

A round starts from exactly what round N - 1 left, never from process state; that is what lets a
killed run go on with the same numbers. So the last two rounds stay.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedseg.segmentation.tensor_file import write_tensors

__all__ = ["load_kept", "save_kept"]

_ROUNDS = 2
_RUNS = 3
"""State of older runs goes when a new run begins."""


def save_kept(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors atomically into `folder`, a `<study-run>/<site>/round-N`; drop old rounds."""
    new_run = not folder.parent.parent.exists()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{name}.safetensors", tensors)
    for old in sorted(folder.parent.glob("round-*"), key=_number)[:-_ROUNDS]:
        shutil.rmtree(old, ignore_errors=True)
    if new_run:
        runs = sorted(folder.parents[2].iterdir(), key=lambda p: p.stat().st_mtime)
        for old in runs[:-_RUNS]:
            shutil.rmtree(old, ignore_errors=True)


def load_kept(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """Read tensors back, None where there are none or the file is damaged.

    A site that wasn't drawn or was late has no folder of the round before: it goes on from the
    newest older one.
    """
    rounds = [path for path in folder.parent.glob("round-*") if _number(path) <= _number(folder)]
    for found in sorted(rounds, key=_number, reverse=True):
        try:
            return load_file(found / f"{name}.safetensors")
        except (OSError, SafetensorError):
            continue
    return None


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])
