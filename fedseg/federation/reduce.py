"""Average updates that wait on disk: a running mean in site order, one tensor at a time.

Memory is one model whatever the number of sites, and the sum never depends on who came first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

__all__ = ["spool", "weighted_mean"]


def spool(folder: Path, site: str, update: Mapping[str, torch.Tensor]) -> Path:
    """Keep a site's checked update on disk until the round's end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{site}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in update.items()}, path)
    return path


def weighted_mean(
    paths: Mapping[str, Path], weights: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Average spooled updates, summed in float64, in order of the sites' names.

    Args:
        paths: File of each site.
        weights: Weight of each site, at least one greater than 0.

    Returns:
        The mean in the type of the updates.
    """
    sites = sorted(paths)
    total = sum(weights[site] for site in sites)
    files: list[Any] = [safe_open(paths[site], framework="pt") for site in sites]
    mean = {}
    for name in sorted(files[0].keys()):
        first = files[0].get_tensor(name)
        running = torch.zeros(first.shape, dtype=torch.float64)
        for site, file in zip(sites, files, strict=True):
            running.add_(file.get_tensor(name).double(), alpha=weights[site] / total)
        mean[name] = running.to(first.dtype)
    return mean
