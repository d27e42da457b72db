"""Keep an optimiser's moments between rounds on the site's disk, as tensors, without pickle."""

from pathlib import Path

import torch

from fedseg.segmentation.kept import load_kept, save_kept

__all__ = ["load_optimizer", "save_optimizer"]


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the state into `round-N`."""
    tensors = {
        f"{index}/{name}": value
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
        if isinstance(value, torch.Tensor)
    }
    save_kept(folder, "optimizer", tensors)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> bool:
    """Restore the state that `round-N` left.

    Returns:
        Whether there was one that fits; without it the optimiser starts anew, as in round 1.
    """
    tensors = load_kept(folder, "optimizer")
    if tensors is None:
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        if int(index) >= len(parameters):
            return False
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # Fused kernels pair weight and moment as they lie in memory: channels last, both.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    if set(state) != set(range(len(parameters))):
        return False
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return True
