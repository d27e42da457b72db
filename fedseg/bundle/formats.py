"""A network's weights in the formats a bundle has, each checked against the network itself."""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fedseg.data.plan import Plan
from fedseg.errors import ModelError

__all__ = ["check_onnx_packages", "write_onnx", "write_state", "write_torchscript"]

_CLOSE = 1e-3
"""Most that two formats' logits may differ; they differ by about 1e-5."""

_ONNX = ("onnx", "onnxscript", "onnxruntime")


def write_state(network: nn.Module, path: Path) -> None:
    """Write the state dict; `torch.load(path, weights_only=True)` reads it."""
    torch.save(
        {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}, path
    )


def write_torchscript(network: nn.Module, plan: Plan, path: Path) -> None:
    """Write the network as TorchScript and compare its logits.

    Raises:
        ModelError: It can't be written so, or computes something else.
    """
    network.cpu().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has newer formats; bundles have this one
        try:
            torch.jit.script(network).save(str(path))  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(
                f"{path.name}: '{plan.model}' has no TorchScript ({first}); take a built-in network"
            ) from None
        loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
        _compare(network, plan, path, loaded)


def check_onnx_packages() -> None:
    """Check that ONNX can be written.

    Raises:
        ModelError: A package is missing.
    """
    missing = [name for name in _ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"--onnx: package {missing[0]} isn't installed; run `pip install 'fedseg[onnx]'`"
        )


def write_onnx(network: nn.Module, plan: Plan, path: Path) -> None:
    """Write the network as ONNX, any batch and size, and compare its logits by onnxruntime.

    Raises:
        ModelError: A package is missing, or ONNX computes something else.
    """
    check_onnx_packages()
    import onnxruntime

    network.cpu().eval()
    free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3, 4)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(2, 1, *plan.patch_size),),
            path,
            dynamo=True,
            input_names=["image"],
            output_names=["pred"],
            dynamic_shapes=(free,),
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def forward(image: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    _compare(network, plan, path, forward)


def _compare(
    network: nn.Module, plan: Plan, path: Path, forward: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Compare logits on noise, of a patch and of another batch and size."""
    noise = torch.Generator().manual_seed(0)
    x, y, z = plan.patch_size
    for shape in ((1, 1, x, y, z), (2, 1, 2 * x, y, z)):
        image = torch.randn(shape, generator=noise)
        with torch.inference_mode():
            apart = float((forward(image) - network(image)).abs().max())
        if not apart <= _CLOSE:
            raise ModelError(
                f"{path.name}: its logits differ by {apart:.1g} from the network's; use another "
                "version of torch"
            )
