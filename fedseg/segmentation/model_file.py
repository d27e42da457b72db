"""Model files: weights in safetensors whose metadata says how to rebuild network and plan."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fedseg.data.plan import Plan
from fedseg.errors import FedSegError, ModelError
from fedseg.registry import is_custom
from fedseg.segmentation.models import build_model
from fedseg.segmentation.tensor_file import write_tensors

__all__ = ["load_model", "read_model_file", "save_model", "sha256_of"]

_FORMAT = "fedseg-model-1"


def save_model(path: Path, state: Mapping[str, torch.Tensor], plan: Plan, **notes: str) -> None:
    """Write weights atomically.

    Args:
        path: A `.safetensors` file.
        state: The network's whole state dict.
        plan: How to rebuild the network and preprocess for it.
        **notes: More metadata, text only (study run, round).
    """
    metadata = {"format": _FORMAT, "plan": plan.to_json(), **notes}
    write_tensors(path, state, metadata=metadata)


def read_model_file(path: Path) -> tuple[dict[str, torch.Tensor], Plan, dict[str, str]]:
    """Read weights, plan and metadata.

    Raises:
        ModelError: The file is missing, damaged or not one of ours.
    """
    mend = "give a model-best.safetensors of a run"
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file; {mend}")
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable .safetensors file ({error}); {mend}") from None
    if metadata.get("format") != _FORMAT:
        raise ModelError(f"{path}: not written by fedseg, it has no plan in its metadata; {mend}")
    try:
        plan = Plan.from_json(metadata["plan"])
    except (FedSegError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"{path}: its plan can't be read ({first}); {mend}") from None
    return state, plan, metadata


def load_model(path: Path, *, allow_custom_code: bool = False) -> tuple[nn.Module, Plan]:
    """Rebuild the network of a model file.

    Args:
        path: The file.
        allow_custom_code: Whether a network named `pkg.mod:function` may be imported: whoever made
            the file then chooses which installed function runs.

    Raises:
        ModelError: The file is missing, damaged, names code that isn't allowed, or its weights
            don't fit its network.
    """
    state, plan, _ = read_model_file(path)
    if is_custom(plan.model) and not allow_custom_code:
        raise ModelError(
            f"{path}: its network is code from outside fedseg ('{plan.model}'); if you trust the "
            "file, say --allow-custom-code"
        )
    try:
        network = build_model(plan)
        network.load_state_dict(state)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{path}: its network '{plan.model}' needs package {error.name}; install it"
        ) from None
    except RuntimeError:
        raise ModelError(
            f"{path}: its weights don't fit the network '{plan.model}' of this version; "
            "use the version it was made with"
        ) from None
    return network, plan


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
