"""What is drawn and written where a run ends: the study's report, and each site's own.

A report that can't be made is a line in the log: the run has all else.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.held_out import server_cases
from fedseg.data.plan import Plan
from fedseg.data.sites import Site
from fedseg.messages import Task
from fedseg.report.overlays import draw_pictures, save_pictures
from fedseg.report.quality import summary_table
from fedseg.report.report import write_report, write_site_report
from fedseg.report.run_files import scores
from fedseg.segmentation.evaluation import score_cases
from fedseg.segmentation.metrics import add, summarise
from fedseg.segmentation.model_file import read_model_file
from fedseg.segmentation.training import choose_device

__all__ = ["report_run", "report_site"]

log = logging.getLogger(__name__)


def report_run(
    folder: Path, network: nn.Module | None, plan: Plan, study: StudyConfig, *, simulated: bool
) -> Path | None:
    """Draw the server's own cases with the best model, and write `report.html`.

    Args:
        folder: The run folder.
        network: Any weights of the run's network; None: draw nothing.
        plan: The plan.
        study: The study config.
        simulated: Whether all sites are simulated.

    Returns:
        The report, None where it can't be made.
    """
    if network is not None:
        try:
            _draw(folder, network, plan, study, simulated=simulated)
        except Exception as error:
            log.warning("report: no pictures (%s)", _one_line(error))
    try:
        return write_report(folder)
    except Exception as error:
        log.warning("report: not written (%s)", _one_line(error))
        return None


def _draw(
    folder: Path, network: nn.Module, plan: Plan, study: StudyConfig, *, simulated: bool
) -> None:
    held = server_cases(study, plan, simulated=simulated).get("global")
    best = folder / "model-best.safetensors"
    if held is None or not best.is_file():
        return
    network = copy.deepcopy(network)
    network.load_state_dict(read_model_file(best)[0])
    cases, annotated = held.cases, held.annotated
    device, precision = choose_device("auto"), study.train.precision
    scored = score_cases(
        network, cases, plan, device=device, precision=precision, annotated=annotated
    )
    pictures = draw_pictures(
        network, cases, scored, plan, device=device, precision=precision, annotated=annotated
    )
    save_pictures(folder, pictures)


def report_site(
    site: Site,
    task: Task,
    plan: Plan,
    study: StudyConfig,
    network: nn.Module,
    cases: Sequence[CachedCase],
    scored: Sequence[Mapping[str, float]],
    *,
    device: torch.device,
) -> Path | None:
    """Write a site's own report into its cache folder; no part of it leaves the site.

    Args:
        site: The site.
        task: The task.
        plan: The plan.
        study: The study config.
        network: The shared model.
        cases: The site's held-out cases.
        scored: Sums of each, see `evaluation.score_cases`.
        device: Where to predict.

    Returns:
        `<cache-dir>/reports/<study-run>/<site>.html`, None where it can't be made.
    """
    if not cases:
        return None
    name = site.name or "site"
    try:
        pictures = draw_pictures(
            network,
            cases,
            scored,
            plan,
            device=device,
            precision=study.train.precision,
            annotated=site.config.labels,
        )
        summary = scores(summarise(add(scored)))
        path = write_site_report(
            site.config.cache / "reports" / task.study_run / f"{name}.html",
            site=name,
            run_id=task.study_run,
            round_number=task.round_number,
            table=summary_table("Held-out cases of this site", {"mean": summary}),
            pictures=pictures,
        )
    except Exception as error:
        log.warning("own report: not written (%s)", _one_line(error))
        return None
    log.info("own report, which stays here: %s", path)
    return path


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
