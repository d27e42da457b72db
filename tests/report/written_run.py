"""Run folders as files, written by hand, for tests of the report."""

import json
from pathlib import Path
from typing import Any

import torch

from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan
from fedseg.report.overlays import save_pictures
from fedseg.report.run import Picture
from fedseg.segmentation.lesions import LESION_COUNTS, lesion_summary
from fedseg.segmentation.model_file import save_model, sha256_of
from fedseg.segmentation.models import build_model
from fedseg.segmentation.overlay import draw_overlay

SITES = ("aachen", "bonn", "chemnitz")


def summary(liver: float | None, tumor: float | None, cases: int = 4) -> dict[str, Any]:
    found: dict[str, Any] = {"cases": cases, "skipped": 0}
    for region, dice in (("liver", liver), ("tumor", tumor)):
        found[f"{region}.dice"] = dice
        found[f"{region}.dice.cases"] = 0 if dice is None else cases
        found[f"{region}.dice.pooled"] = dice
    return found


def site(dice: float, **entries: Any) -> dict[str, Any]:
    return {
        "status": "ok",
        "reason": None,
        "weight": 3.0,
        "seconds": 12.5,
        "bytes_up": 2_000_000,
        "training": {"cases": 3.0, "loss": 0.5, "skipped": 0.0},
        "metrics": summary(dice, None if dice < 0.5 else dice / 2, 2),
        **entries,
    }


def line(number: int, **entries: Any) -> dict[str, Any]:
    """A round; scores rise up to round 3 and fall in round 4."""
    dice = (0.1, 0.6, 0.7, 0.9, 0.8)[number]
    lesions = lesion_summary({name: 2.0 for name in LESION_COUNTS})
    sites = {name: site(dice - 0.1 * n) for n, name in enumerate(SITES)} if number else {}
    return {
        "round": number,
        "global": {
            **summary(dice, dice / 2),
            **{f"tumor.{name}": value for name, value in lesions.items()},
        },
        "unseen": summary(dice - 0.05, None),
        "federated": summary(dice - 0.1, dice / 3) if number else {},
        "sites": sites,
        "seconds": 40.25,
        "bytes_up": 6_000_000 if number else 0,
        "bytes_down": 9_000_000 if number else 0,
        "privacy": None,
        "late": [],
        **entries,
    }


def lines() -> list[dict[str, Any]]:
    """Four rounds; somebody is missing in rounds 2 to 4."""
    found = [line(number) for number in range(5)]
    found[2]["sites"]["bonn"] = site(0.6, status="quarantined", reason="update-norm", weight=0.0)
    found[3]["sites"]["chemnitz"] = site(0.7, status="late", reason="deadline", weight=0.0)
    found[4]["sites"]["aachen"] = site(0.8, status="refused", reason="policy-max-bytes")
    found[4]["late"] = [{"site": "chemnitz", "round": 3, "status": "ok", "used": True}]
    return found


def comparison() -> dict[str, Any]:
    def difference(value: float) -> dict[str, Any]:
        return {"pairs": 6, "difference": value, "low": value - 0.02, "high": value + 0.02}

    rows = {f"local: {name}": summary(0.7, 0.3 + 0.1 * n) for n, name in enumerate(SITES)}
    return {
        "steps": 120,
        "rows": {**rows, "pooled": summary(0.92, 0.6), "federated": summary(0.9, 0.55)},
        "matrix": {
            one: {other: summary(0.9 if one == other else 0.4, None, 2) for other in SITES}
            for one in SITES
        },
        "per_site": {"federated": {other: summary(0.88, 0.5, 2) for other in SITES}},
        "differences": {name: {"liver.dice": difference(0.2)} for name in (*rows, "pooled")},
    }


def picture(title: str = "Worst case") -> Picture:
    image = torch.zeros(8, 8, 4).numpy()
    labels = (image == 0).astype("uint8")
    scan = draw_overlay(image, labels * 0, spacing=(1, 1, 1), window=(-2, 2))
    overlay = draw_overlay(image, labels, spacing=(1, 1, 1), window=(-2, 2))
    return Picture(title=title, case="case 2 of 3", scan=scan, overlay=overlay, dice={"liver": 0.5})


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    (folder / "history.jsonl").write_text("".join(json.dumps(part) + "\n" for part in history))


def write_run(folder: Path) -> Path:
    """Write a finished run with all that a run folder can have."""
    study = StudyConfig.from_run_config(
        {"model.width": 2, "model.depth": 2, "train.patch-size": "16,16,16", "federation.rounds": 4}
    )
    plan = make_plan(study)
    folder.mkdir(parents=True)
    for name, number in (("model-best", "3"), ("model-last", "4")):
        state = build_model(plan).state_dict()
        save_model(folder / f"{name}.safetensors", state, plan, run=folder.name, round=number)
    (folder / "config.json").write_text(study.model_dump_json(by_alias=True))
    (folder / "plan.json").write_text(plan.to_json())
    manifest = {
        "run": folder.name,
        "fedseg": "0.1.0",
        "python": "3.11.7",
        "packages": {"flwr": "1.42.0"},
        "git_commit": None,
        "code_sha256": "c0de" * 16,
        "seed": 0,
        "parameters": 1234,
        "shared_scans": [["aachen", "bonn", 2]],
        "status": "completed",
        "error": None,
        "sites": {name: {"verified": name != "bonn", "simulated": False} for name in SITES},
        "flwr_runs": [7],
        "sha256": {path.name: sha256_of(path) for path in folder.glob("*.safetensors")},
        "personal": {
            "aachen": {"kept": True, "global": summary(0.8, 0.3), "personal": summary(0.85, 0.4)},
            "bonn": {"kept": False, "global": summary(0.8, 0.3), "personal": summary(0.7, 0.2)},
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_history(folder, lines())
    (folder / "comparison.json").write_text(json.dumps(comparison()))
    save_pictures(folder, [picture("Median case"), picture()])
    return folder
