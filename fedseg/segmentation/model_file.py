"""Model files: weights in safetensors whose metadata says how to rebuild network and plan."""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fedseg.data.plan import Plan
from fedseg.errors import FedSegError, ModelError
from fedseg.registry import is_custom
from fedseg.sections import OutputConfig
from fedseg.segmentation.models import build_model
from fedseg.segmentation.tensor_file import write_tensors

__all__ = ["BEST", "DEMO", "find_model", "load_model", "read_model_file", "save_model", "sha256_of"]

BEST = "model-best.safetensors"
"""The model file of a run that is meant where a run is named."""

DEMO = "demo"
"""Names the small pretrained model of the package `fedseg_weights`."""

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


def find_model(name: str | Path, *, runs: Path | None = None) -> Path:
    """Find the file that a user means: a file, a run's folder or id, or `demo`.

    Args:
        name: What a user typed; what is on the disk comes first, but for `demo`.
        runs: Where runs are; None: `output.dir`'s default.

    Returns:
        The best model of a run; a path that isn't there comes back as it is.

    Raises:
        ModelError: `demo`, and its package isn't installed.
    """
    if str(name) == DEMO:
        return _demo_file()
    path = Path(name).expanduser()
    root = Path(OutputConfig().dir if runs is None else runs).expanduser()
    for folder in (path, root / path):
        if (folder / BEST).is_file():
            return folder / BEST
    return path


def _demo_file() -> Path:
    # Not a part of fedseg: an app bundle brings its own fedseg, without files that aren't code.
    found = importlib.util.find_spec("fedseg_weights")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder) / "demo.safetensors").is_file():
            return Path(folder) / "demo.safetensors"
    raise ModelError(
        "demo: its package fedseg_weights isn't installed here; run `pip install fedseg`, or give "
        "a model file"
    )


def read_model_file(path: Path) -> tuple[dict[str, torch.Tensor], Plan, dict[str, str]]:
    """Read weights, plan and metadata of a model file, or of what else `find_model` finds.

    Raises:
        ModelError: The file is missing, damaged or not one of ours.
    """
    mend = "give a model-best.safetensors of a run"
    path = find_model(path)
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
        path: The file, or what else `find_model` finds.
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
