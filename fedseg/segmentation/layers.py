"""Layers that take the place of PyTorch's where those are slow or wrong, and memory formats."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

__all__ = ["memory_format", "place", "swap_layers"]


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


class _ExactWhereWide(_ConvNd):
    """Computes in float32 where the kernel is wider than the image, at the bottom of a deep U-Net.

    There the gradient of the weights in bf16 on a CPU has whatever lay in memory before (oneDNN in
    torch 2.13 with AVX512-BF16): a wrong number, or NaN in one of fourteen steps. So small an image
    takes no time in either format.
    """

    def forward(self, input: torch.Tensor, *rest: Any) -> torch.Tensor:
        if not _is_wide(self, input):
            return super().forward(input, *rest)  # type: ignore[no-any-return]
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float(), *rest)  # type: ignore[no-any-return]


class _Conv3d(_ExactWhereWide, nn.Conv3d):
    """A convolution."""


class _ConvTranspose3d(_ExactWhereWide, nn.ConvTranspose3d):
    """A transposed convolution."""


_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv3d: _Conv3d,
    nn.ConvTranspose3d: _ConvTranspose3d,
    nn.InstanceNorm3d: _InstanceNorm3d,
}


def _is_wide(layer: _ConvNd, input: torch.Tensor) -> bool:
    """Whether a kernel reaches beyond both ends of an image that is computed in bf16 on a CPU."""
    if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    sides = zip(layer.kernel_size, layer.dilation, input.shape[-3:], strict=True)
    return any((kernel - 1) * apart + 1 > side for kernel, apart, side in sides)


def swap_layers(network: nn.Module) -> nn.Module:
    """Swap a network's layers in place; values and parameters stay."""
    for module in network.modules():
        if not getattr(module, "track_running_stats", False):
            module.__class__ = _SWAPPED.get(type(module), type(module))
    return network


def memory_format(device: torch.device) -> torch.memory_format:
    """How images and weights lie in memory: channels last is faster, but MPS may lack it in 3D."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last_3d


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Bring a network to its device, in place, laid out as it is fastest there."""
    return swap_layers(network.to(device, memory_format=memory_format(device)))  # type: ignore[call-overload]
