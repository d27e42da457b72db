"""Which part of a network is averaged, which stays at its site, and which only travels."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["SplitState", "head_names", "norm_names", "split_state"]

State = dict[str, torch.Tensor]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class SplitState:
    """A network's state in three parts.

    Attributes:
        shared: Floating-point tensors that are averaged.
        local: Floating-point tensors that stay at each site.
        fixed: Integer buffers: the server's are sent, never averaged.
    """

    shared: State
    local: State
    fixed: State


def split_state(network: nn.Module, shared: str = "all") -> SplitState:
    """Split a network's state.

    Args:
        network: The network.
        shared: What is averaged: `all`; `all-but-norm` (FedBN; Li et al., ICLR 2021: normalisation
            layers stay local); `all-but-head` (FedPer; Arivazhagan et al., 2019).
    """
    stays: set[str] = set()
    if shared == "all-but-norm":
        stays = norm_names(network)
    elif shared == "all-but-head":
        stays = head_names(network)
    state = network.state_dict()
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return SplitState(
        shared={name: tensor for name, tensor in floats.items() if name not in stays},
        local={name: tensor for name, tensor in floats.items() if name in stays},
        fixed={name: tensor for name, tensor in state.items() if name not in floats},
    )


def norm_names(network: nn.Module) -> set[str]:
    """Names of the normalisation layers' tensors."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, _NORMS)
        for name in module.state_dict()
    }


def head_names(network: nn.Module) -> set[str]:
    """Names of the tensors of the layer that gives the logits: the last one that has a weight.

    In the order of their definition, which in every network of `MODELS` is that of the forward
    pass at its end; shapes don't tell, for a layer in between may have as many channels.
    """
    last = None
    for prefix, module in network.named_modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            last = prefix, module
    if last is None:
        return set()
    prefix, module = last
    return {f"{prefix}.{name}" if prefix else name for name in module.state_dict()}
