"""Write tensors to a .safetensors file that is there whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

__all__ = ["write_tensors"]


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
) -> None:
    """Write the file beside its place, then give it its name in one step.

    Args:
        path: The file; what was there before stays until the new one is whole.
        tensors: What it holds.
        metadata: Text beside them.
        durable: Whether it must also outlive a power failure.

    Raises:
        OSError: It can't be written.
    """
    partial = path.with_name(f".{os.getpid()}-{path.name}.partial")
    try:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial, metadata=dict(metadata) if metadata else None)
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        partial.unlink(missing_ok=True)
