"""Keep an optimiser's moments between rounds on the site's disk, as tensors, without pickle."""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

__all__ = ["load_optimizer", "save_optimizer"]

_FILE = "optimizer.safetensors"
_KEPT = 2


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the state atomically into `round-N`; only the last two rounds are kept."""
    tensors = {
        f"{index}/{name}": value.detach().cpu().contiguous()
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
        if isinstance(value, torch.Tensor)
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}-{_FILE}"
    save_file(tensors, temporary)
    os.replace(temporary, folder / _FILE)
    rounds = sorted(folder.parent.glob("round-*"), key=lambda p: int(p.name.partition("-")[2]))
    for old in rounds[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> bool:
    """Restore the state that `round-N` left.

    Returns:
        Whether there was one that fits; without it the optimiser starts anew, as in round 1.
    """
    try:
        tensors = load_file(folder / _FILE)
    except (OSError, SafetensorError):
        return False
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    if set(state) != set(range(sum(len(group["params"]) for group in whole["param_groups"]))):
        return False
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
    return True
