"""The checkpoint: all that a killed run needs to go on with the very same numbers, in one file.

Weights, the strategy's own state and the progress (round, best score, quarantine, late sites,
history) become one safetensors file that replaces the last one in a single step. There is no random
state in it: all randomness derives from (seed, site, round).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedseg.errors import StudyError
from fedseg.segmentation.tensor_file import write_tensors

__all__ = ["Checkpoint", "Progress", "load_checkpoint", "save_checkpoint"]

_FORMAT = "fedseg-checkpoint-1"
_FILE = "state.safetensors"


@dataclass(kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        round: Last whole round.
        best: Score of the best model so far, see `history.score`.
        best_regions: Number of regions in it.
        since_best: Evaluations since then; those of fewer regions say nothing.
        quarantine: The guard's state, see `guard.Quarantine`.
        late: Sites that haven't answered: name to the round they were asked in and the message id.
        sites: Number of sites the run began with.
        releases: Rounds that differential privacy has accounted for.
        history: Lines of `history.jsonl`.
    """

    round: int = 0
    best: float | None = None
    best_regions: int = 0
    since_best: int = 0
    quarantine: dict[str, Any] = field(default_factory=dict)
    late: dict[str, tuple[int, str]] = field(default_factory=dict)
    sites: int = 0
    releases: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        model: The global model's state.
        strategy: State of the strategy (server optimiser).
        progress: How far the run is.
    """

    model: Mapping[str, torch.Tensor]
    strategy: Mapping[str, torch.Tensor]
    progress: Progress


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `folder` by a new one, in one step.

    Raises:
        StudyError: The disk is full or can't be written; the last checkpoint is still whole.
    """
    parts = {"model": checkpoint.model, "strategy": checkpoint.strategy}
    tensors = {
        f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()
    }
    metadata = {"format": _FORMAT, "progress": json.dumps(asdict(checkpoint.progress))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / _FILE, tensors, metadata=metadata, durable=True)
    except OSError as error:
        raise StudyError(
            f"{folder}: the checkpoint can't be written ({error}); the last one is whole: free "
            "space, then go on with output.resume"
        ) from None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint.

    Raises:
        StudyError: There is none, or it can't be read.
    """
    path = folder / _FILE
    tensors: dict[str, dict[str, torch.Tensor]] = {"model": {}, "strategy": {}}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition("/")
                tensors[part][name] = file.get_tensor(key)
        if metadata.get("format") != _FORMAT:
            raise ValueError("another format")
        progress = Progress(**json.loads(metadata["progress"]))
    except FileNotFoundError:
        raise StudyError(
            f"output.resume: no checkpoint in {folder}; give the folder of a run that finished a "
            "round"
        ) from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"output.resume: {path} can't be read ({error})") from None
    return Checkpoint(progress=progress, **tensors)
