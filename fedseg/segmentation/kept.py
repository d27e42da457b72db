"""What a site keeps between rounds, on its own disk: tensors in `round-N/<name>.safetensors`.

A round starts from exactly what round N - 1 left, never from process state; that is what lets a
killed run go on with the same numbers. So the last two rounds stay.
"""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedseg.segmentation.tensor_file import write_tensors

__all__ = ["load_kept", "mark_finished", "save_kept"]

_ROUNDS = 2
_RUNS = 3
"""When a new run begins, the state of finished runs goes but for the last used ones."""

_IDLE_SECONDS = 30 * 24 * 3600.0
"""So does that of a run that nobody went on with for so long."""

_FINISHED = "finished"


def save_kept(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors atomically into `folder`, a `<study-run>/<site>/round-N`; drop old rounds."""
    run = folder.parent.parent
    new_run = not run.exists()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{name}.safetensors", tensors)
    os.utime(run)
    for old in sorted(folder.parent.glob("round-*"), key=_number)[:-_ROUNDS]:
        shutil.rmtree(old, ignore_errors=True)
    if new_run:
        _drop_runs(run.parent)


def mark_finished(folder: Path, *, finished: bool) -> None:
    """Note whether a run's last planned round is done; `folder` is one that `save_kept` made."""
    mark = folder.parent.parent / _FINISHED
    if finished:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def load_kept(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """Read tensors back, None where there are none or the file is damaged or not finite.

    A site that wasn't drawn or was late has no folder of the round before: it goes on from the
    newest older one.
    """
    rounds = [path for path in folder.parent.glob("round-*") if _number(path) <= _number(folder)]
    for found in sorted(rounds, key=_number, reverse=True):
        try:
            tensors = load_file(found / f"{name}.safetensors")
        except (OSError, SafetensorError):
            continue
        if all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            return tensors
    return None


def _drop_runs(runs: Path) -> None:
    used = {path: _last_use(path) for path in runs.iterdir()}
    for old in sorted(used, key=used.__getitem__, reverse=True)[_RUNS:]:
        if (old / _FINISHED).exists() or time.time() - used[old] > _IDLE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)


def _last_use(run: Path) -> float:
    try:
        return run.stat().st_mtime
    except FileNotFoundError:  # another site with this cache was quicker
        return 0.0


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])
