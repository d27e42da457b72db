"""Where a run comes from: plan with reasons, versions, hashes, config."""

from collections.abc import Mapping
from typing import Any

from fedseg.report.amounts import size
from fedseg.report.run import Run
from fedseg.report.run_files import table, text

__all__ = ["config_rows", "model_rows", "plan_rows", "version_rows"]

_PLAN_WORDS = {
    "spacing": "voxel size, mm",
    "ct_window": "CT window, HU",
    "mr_percentiles": "MR percentiles",
    "patch_size": "training patch, voxels",
    "batch_size": "patches a step",
    "inference_patch": "sliding window, voxels",
    "model": "network",
    "width": "channels of the first level",
    "depth": "levels",
}


def plan_rows(run: Run) -> list[tuple[str, str, str]]:
    """Show each planned value with its reason."""
    reasons = table(run.plan.get("reasons"))
    return [
        (_PLAN_WORDS.get(key, key), _shown(value, _between(key)), text(reasons.get(key)))
        for key, value in run.plan.items()
        if key != "reasons"
    ]


def _between(key: str) -> str:
    return " to " if key in ("ct_window", "mr_percentiles") else " x "


def version_rows(run: Run) -> list[tuple[str, str]]:
    """Show versions, commit, seed and Flower's run ids."""
    manifest = run.manifest
    rows = [("fedseg", manifest.get("fedseg")), ("Python", manifest.get("python"))]
    rows += list(table(manifest.get("packages")).items())
    rows += [
        ("git commit", manifest.get("git_commit")),
        ("SHA-256 of the code", manifest.get("code_sha256")),
        ("seed", manifest.get("seed")),
        ("parameters of the network", manifest.get("parameters")),
        ("Flower runs", manifest.get("flwr_runs")),
    ]
    return [(name, _shown(value)) for name, value in rows if value not in (None, [], "")]


def model_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """Show each model file: name, round, size, SHA-256."""
    return [
        (model.name, model.round, size(model.bytes), model.sha256 or "not written down")
        for model in run.models
    ]


def config_rows(run: Run) -> list[tuple[str, str]]:
    """Flatten the study config: `train.seed` and so on; unset keys are empty."""
    return list(_flat(run.config))


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in section.items():
        if isinstance(value, dict) and len(prefix) < 64:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, _shown(value)))
    return rows


def _shown(value: object, between: str = ", ") -> str:
    """Show a value as a config file would; what is nested deeper isn't there."""
    if isinstance(value, list):
        return between.join("..." if isinstance(part, list) else _shown(part) for part in value)
    if value is None or isinstance(value, dict):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
