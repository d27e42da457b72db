"""What a run has left: its history, its last weights, and where a broken one lies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def history(folder: Any) -> list[dict[str, Any]]:
    """Lines of `history.jsonl`."""
    return [json.loads(line) for line in (folder.path / "history.jsonl").read_text().splitlines()]


def weights(folder: Any, name: str = "model-last.safetensors") -> dict[str, torch.Tensor]:
    """Weights of the last model, or of another file."""
    found: dict[str, torch.Tensor] = load_file(folder.path / name)
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two runs ended with the same bits."""
    return all(torch.equal(t, weights(other)[name]) for name, t in weights(one).items())


def last_run(run_study: Callable[..., Any]) -> Path:
    """Folder of the last run, which may have failed."""
    return (Path(run_study.grid.run_config["output.dir"]) / "latest").resolve()  # type: ignore[attr-defined]
