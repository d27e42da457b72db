"""Export a model as a MONAI bundle, which runs where FedSeg isn't installed."""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedseg.bundle.card import license_text, model_card
from fedseg.bundle.configs import REQUIREMENTS, SCHEMA, inference_config, metadata_config
from fedseg.bundle.facts import Facts, evaluation_rows, facts_of
from fedseg.bundle.formats import (
    check_onnx_packages,
    write_onnx,
    write_state,
    write_torchscript,
)
from fedseg.bundle.source import copy_code
from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.errors import ConfigError, DataError, ModelError
from fedseg.registry import is_custom
from fedseg.segmentation.model_file import find_model, load_model, read_model_file, sha256_of

__all__ = ["export_bundle"]


def export_bundle(
    source: str | Path,
    out: Path,
    *,
    onnx: bool = False,
    overwrite: bool = False,
    license: str = "not stated; ask who made the run",
    authors: str = "not stated",
    modality: str = "auto",
    scores: Path | None = None,
) -> Path:
    """Write a bundle: configs, weights, TorchScript, code, model card and licence.

    Args:
        source: A run (id or folder: its best model), a model file, or `demo`.
        out: Folder of the bundle; there whole or not at all.
        onnx: Also write `models/model.onnx`.
        overwrite: Replace the folder if it is there.
        license: Licence of the weights.
        authors: Who made them.
        modality: auto, ct or mr.
        scores: What `fedseg evaluate --json` printed for this model: metrics with intervals.

    Returns:
        The folder.

    Raises:
        ModelError: The model can't be read, its network is custom code, or a format fails.
        DataError: The folder exists or can't be written, or `scores` can't be read.
    """
    if onnx:
        check_onnx_packages()
    file = find_model(source)
    _, plan, notes = read_model_file(file)
    if is_custom(plan.model):
        raise ModelError(
            f"{file}: its network is code from outside fedseg ('{plan.model}'); a bundle can't "
            "carry it, hand on the model file and that package"
        )
    out = out.absolute()
    if out.exists() and not overwrite:
        raise DataError(f"{out}: exists; give another folder, or --overwrite")
    run = file.parent if _is_run(file.parent) else None
    facts = facts_of(out.name, notes, run, license=license, authors=authors)
    if scores is not None:
        facts = replace(facts, rows=(*facts.rows, *evaluation_rows(scores)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            bundle = Path(scratch) / out.name
            _write(bundle, file, plan, facts, onnx=onnx, modality=modality)
            if out.exists():
                _remove(out)
            os.replace(bundle, out)
    except OSError as error:
        raise DataError(f"{out}: can't be written ({error.strerror}); give another") from None
    return out


def _is_run(folder: Path) -> bool:
    """Tell a run's folder from another that has a `config.json`, as models elsewhere do."""
    if (folder / "history.jsonl").is_file():
        return True
    try:
        StudyConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError):
        return False
    return True


def _remove(out: Path) -> None:
    """Remove an older bundle, and nothing else."""
    if not (out / "configs" / "metadata.json").is_file():
        raise DataError(f"{out}: exists and is no bundle; give another folder")
    shutil.rmtree(out)


def _write(
    bundle: Path, file: Path, plan: Plan, facts: Facts, *, onnx: bool, modality: str
) -> None:
    for name in ("configs", "models", "docs"):
        (bundle / name).mkdir(parents=True)
    copy_code(bundle / "scripts")
    network, _ = load_model(file)
    models = bundle / "models"
    write_state(network, models / "model.pt")
    write_torchscript(network, plan, models / "model.ts")
    if onnx:
        write_onnx(network, plan, models / "model.onnx")
    hashes = {f"models/{path.name}": sha256_of(path) for path in sorted(models.iterdir())}
    configs = {
        "inference.json": inference_config(plan, modality=modality),
        "metadata.json": metadata_config(plan, facts),
        "meta_schema.json": SCHEMA,
    }
    for name, content in configs.items():
        _text(bundle / "configs" / name, _json(content))
    card = model_card(plan, facts, {**hashes, file.name: sha256_of(file)})
    _text(bundle / "docs" / "README.md", card)
    _text(bundle / "LICENSE", license_text(facts))
    _text(bundle / "requirements.txt", "\n".join(REQUIREMENTS) + "\n")


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
