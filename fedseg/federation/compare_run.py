"""Compare a finished run with each site alone and all data in one place; keep it in the run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedseg.config import StudyConfig
from fedseg.data.node import open_site
from fedseg.data.plan import Plan
from fedseg.data.prepared_cases import load_cases
from fedseg.errors import ConfigError, FedSegError, StudyError
from fedseg.federation.run_folder import RunFolder
from fedseg.registry import is_custom
from fedseg.segmentation.comparison import Share, compare
from fedseg.segmentation.model_file import load_model

__all__ = ["COMPARISON", "compare_run", "run_steps"]

COMPARISON = "comparison.json"

_LAST = "model-last.safetensors"
"""What all models are after the same steps; the best one was chosen by how it scored."""


def compare_run(
    run: Path,
    *,
    device: torch.device,
    sites: Path | None = None,
    steps: int | None = None,
    allow_custom_code: bool = False,
) -> dict[str, Any]:
    """Train the models to compare with, score all of them, and write `comparison.json`.

    A site trains on the cases, and is scored on the held-out ones, that it had in the run, where
    the folders are the same.

    Args:
        run: The run's folder.
        device: Where networks run.
        sites: Folder of site folders; None: the simulated sites of the study config.
        steps: Optimiser steps of each model; None: as many as a site did in the run.
        allow_custom_code: Whether networks and losses of the study's own may be imported.

    Returns:
        See `comparison.compare`.

    Raises:
        StudyError: The folder holds no finished run, or its sites were no simulated ones.
        ConfigError: The study has code of its own and that isn't allowed.
        DataError: The sites' cases can't be used.
    """
    study, plan = _read(run)
    custom = [name for name in (plan.model, study.train.loss) if is_custom(name)]
    if custom and not allow_custom_code:
        raise ConfigError(
            f"{run / 'config.json'}: the study has code from outside fedseg ('{custom[0]}'); if "
            "you trust it, say --allow-custom-code"
        )
    history = _lines(run)
    steps = steps or run_steps(history)
    if not steps:
        raise StudyError(f"{run}: got no round of training; expected a finished run, or --steps")
    federated, _ = load_model(run / _LAST, allow_custom_code=allow_custom_code)
    shares = _shares(run, study, plan, sites)
    found = compare(federated, shares, plan, study, steps=steps, device=device)
    RunFolder(run).write_json(COMPARISON, found)
    return found


def _read(run: Path) -> tuple[StudyConfig, Plan]:
    try:
        study = StudyConfig.from_json((run / "config.json").read_text(encoding="utf-8"))
        return study, Plan.from_json((run / "plan.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(
            f"{run}: can't read its config.json and plan.json ({error.strerror}); give a run's "
            "folder"
        ) from None
    except FedSegError as error:
        raise StudyError(f"{run}: is of another version ({error})") from None


def _lines(run: Path) -> list[dict[str, Any]]:
    try:
        text = (run / "history.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        raise StudyError(f"{run / 'history.jsonl'}: missing or damaged; say --steps") from None


def run_steps(history: Sequence[dict[str, Any]]) -> int:
    """Optimiser steps that a site did in a run: the most that any did, added up over the rounds.

    Under secure aggregation it is the mean over the sites.
    """
    return sum(_most_steps(line) for line in history)


def _most_steps(line: Mapping[str, Any]) -> int:
    if "secagg" in line:  # only the sum over the sites is known: their mean
        secagg = line["secagg"]
        return math.ceil(float(secagg["sums"]["steps"]) / float(secagg["summed"]))
    sites = line.get("sites", {}).values()
    return max((int((site.get("training") or {}).get("steps", 0)) for site in sites), default=0)


def _shares(run: Path, study: StudyConfig, plan: Plan, sites: Path | None) -> list[Share]:
    if sites is None:
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        known = manifest.get("sites", {})
        if not known or not all(site.get("simulated") for site in known.values()):
            raise StudyError(
                f"{run}: its sites aren't simulated, their data is elsewhere; say --sites DIR for "
                "a folder of site folders"
            )
        count = len(known)
    else:
        data = study.data.model_copy(
            update={"source": "folder", "partition": "folders", "dir": str(sites)}
        )
        study = study.model_copy(update={"data": data})
        if not sites.is_dir():
            raise StudyError(f"{sites}: no such folder; give a folder of site folders")
        count = sum(1 for p in sites.iterdir() if p.is_dir() and not p.name.startswith("."))
    shares = []
    for index in range(count):
        site = open_site({"partition-id": index, "num-partitions": count}, study)
        cases = load_cases(
            site,
            plan,
            validation_fraction=study.train.validation_fraction,
            seed=study.train.seed,
        )
        shares.append(
            Share(
                name=site.name or f"site-{index}",
                training=cases.training,
                validation=cases.validation,
                annotated=tuple(site.config.labels),
            )
        )
    return shares
