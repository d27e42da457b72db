"""Networks: `(Plan, in_channels, classes) -> Module` with one logits tensor `[B, C, x, y, z]`.

None keeps batch statistics: a mean over sites of running averages describes no site, and noise
added at the server can make a variance negative.
"""

from collections.abc import Callable

import torch
from monai.networks.layers.factories import Norm
from monai.networks.nets import AttentionUnet, BasicUNetPlusPlus, UNet
from torch import nn

from fedseg.data.plan import CLASSES, Plan
from fedseg.errors import ConfigError, ModelError
from fedseg.registry import resolve

__all__ = ["MODELS", "build_model", "check_patch", "parameter_count"]

Builder = Callable[[Plan, int, int], nn.Module]


def _channels(plan: Plan) -> list[int]:
    return [plan.width * 2**level for level in range(plan.depth)]


def unet(plan: Plan, in_channels: int, classes: int) -> nn.Module:
    """Residual U-Net (Kerfoot et al., STACOM 2018) with instance normalisation."""
    network: nn.Module = UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=classes,
        channels=_channels(plan),
        strides=[2] * (plan.depth - 1),
        num_res_units=2,
        norm=("instance", {"affine": True}),
    )
    return network


def attention_unet(plan: Plan, in_channels: int, classes: int) -> nn.Module:
    """Attention U-Net (Oktay et al., MIDL 2018); its batch normalisation replaced."""
    network: nn.Module = AttentionUnet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=classes,
        channels=_channels(plan),
        strides=[2] * (plan.depth - 1),
    )
    _replace_batch_norm(network)
    return network


class _FirstOutput(nn.Module):
    """Take the one tensor out of the list that BasicUNetPlusPlus returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(image)[0]
        return logits


def unet_plus_plus(plan: Plan, in_channels: int, classes: int) -> nn.Module:
    """UNet++ (Zhou et al., DLMIA 2018); MONAI's has exactly five levels."""
    if plan.depth != 5:
        raise ConfigError(f"model.depth: got {plan.depth}; expected 5 with model.name 'unet++'")
    channels = _channels(plan)
    return _FirstOutput(
        BasicUNetPlusPlus(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=classes,
            features=(*channels, plan.width),
        )
    )


MODELS: dict[str, Builder] = {
    "unet": unet,
    "attention-unet": attention_unet,
    "unet++": unet_plus_plus,
}


def build_model(plan: Plan, *, seed: int | None = None, in_channels: int = 1) -> nn.Module:
    """Build the plan's network, with seeded initial weights where a seed is given.

    Raises:
        ConfigError: The name or depth has no network.
        ModelError: The network isn't 3D, gives no single logits tensor or keeps batch statistics.
        ModuleNotFoundError: The package of a `pkg.mod:function` isn't installed here.
    """
    builder = resolve("model.name", plan.model, MODELS)
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        network = builder(plan, in_channels, CLASSES)
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"model.name: '{plan.model}' returned {type(network).__name__}; expected a torch Module"
        )
    for module in network.modules():
        if getattr(module, "track_running_stats", False):
            raise ModelError(
                f"model.name: '{plan.model}' keeps batch statistics ({type(module).__name__}); "
                "use instance or group normalisation"
            )
    return network


def check_patch(plan: Plan, *, levels_matter: bool) -> None:
    """Check by arithmetic, before anything is sent, that a patch fits the network.

    Args:
        plan: The plan; its patch and its inference window are checked.
        levels_matter: Whether the network halves `depth - 1` times, as the built-in ones do.

    Raises:
        ConfigError: A size doesn't divide, or leaves fewer than 2 voxels at the deepest level.
    """
    if not levels_matter:
        return
    factor = 2 ** (plan.depth - 1)
    for key, size in (
        ("train.patch-size", plan.patch_size),
        ("train.inference-patch", plan.inference_patch),
    ):
        for n in size:
            if n % factor:
                raise ConfigError(
                    f"{key}: got {','.join(map(str, size))}; expected multiples of {factor} with "
                    f"model.depth {plan.depth}; nearest: {max(2, round(n / factor)) * factor}"
                )
            if n // factor < 2:
                raise ConfigError(
                    f"{key}: got {','.join(map(str, size))}; {n} leaves {n // factor} voxel at the "
                    f"deepest of {plan.depth} levels, expected at least 2; take {2 * factor} or a "
                    "smaller model.depth"
                )


def check_logits(network: nn.Module, plan: Plan) -> None:
    """Run one empty patch through a network from outside.

    Raises:
        ModelError: It fails, or returns anything but logits `[1, classes, *patch]`.
    """
    image = torch.zeros(1, 1, *plan.patch_size)
    try:
        with torch.inference_mode():
            logits = network.eval()(image)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            f"model.name: '{plan.model}' fails on a patch {plan.patch_size} "
            f"({str(error).splitlines()[0]}); expected input [B, 1, x, y, z]"
        ) from None
    expected = (1, CLASSES, *plan.patch_size)
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if got != expected:
        raise ModelError(
            f"model.name: '{plan.model}' gave {got}; expected one logits tensor {expected}"
        )


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _replace_batch_norm(network: nn.Module) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm3d):
            setattr(network, name, Norm["instance", 3](child.num_features, affine=True))
        else:
            _replace_batch_norm(child)
