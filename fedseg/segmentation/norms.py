"""How weights and images lie in memory: channels last, also through instance normalisation."""

import torch
from torch import nn
from torch.nn import functional

__all__ = ["keep_channels_last", "memory_format", "place"]


class _InstanceNorm3d(nn.InstanceNorm3d):
    """PyTorch's own copies each tensor to channels first, and the next convolution copies it back.

    That was two fifths of a step of nnU-Net's network on a CPU. Where a batch is one sample, its
    gradient for a channels-last one is wrong besides (torch 2.13). Batch normalisation of a sample
    alone is the same sum, and has a channels-last kernel.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dim() != 5 or input.device.type != "cpu":
            return super().forward(input)
        samples = [
            functional.batch_norm(
                sample, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
            for sample in torch.split(input, 1)
        ]
        return torch.cat(samples) if len(samples) > 1 else samples[0]


def keep_channels_last(network: nn.Module) -> nn.Module:
    """Speed up a network's instance normalisations in place; values and parameters stay."""
    for module in network.modules():
        if type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = _InstanceNorm3d
    return network


def memory_format(device: torch.device) -> torch.memory_format:
    """How images and weights lie in memory: channels last is faster, but MPS may lack it in 3D."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last_3d


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Bring a network to its device, in place, laid out as it is fastest there."""
    return keep_channels_last(network.to(device, memory_format=memory_format(device)))  # type: ignore[call-overload]
