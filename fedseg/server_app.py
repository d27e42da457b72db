"""The ServerApp: read the study config, find the sites, run the rounds, show the result."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from flwr.app import Context
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from flwr.supercore.exit import ExitCode
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.fingerprint import Fingerprint, shared_scans
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan, needs_fingerprints
from fedseg.errors import FedSegError, StudyError
from fedseg.federation.compatible import check_compatible
from fedseg.federation.federation import (
    Federation,
    outside_rounds,
)
from fedseg.federation.fingerprints import collect_fingerprints
from fedseg.federation.head import tumor_rows
from fedseg.federation.history import check_monitor
from fedseg.federation.privacy_check import check_privacy
from fedseg.federation.reduce import reducer_of
from fedseg.federation.resume import resume
from fedseg.federation.rounds import personal_models, run_rounds
from fedseg.federation.run_folder import RunFolder, new_run_id
from fedseg.federation.secure_round import take_unread
from fedseg.federation.server_evaluation import server_evaluation
from fedseg.federation.sites import KnownSite, find_sites
from fedseg.federation.strategies import (
    check_strategy,
    least_sites,
    make_strategy,
    restore_strategy,
)
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.logs import show_logs
from fedseg.privacy.accountant import check_accountant
from fedseg.registry import is_custom, resolve
from fedseg.report.at_end import report_run
from fedseg.report.table import result_table
from fedseg.report.trackers import check_trackers, tracking
from fedseg.segmentation.lightning_backend import check_backend
from fedseg.segmentation.losses import LOSSES
from fedseg.segmentation.model_file import sha256_of
from fedseg.segmentation.models import build_model, check_logits, check_patch, parameter_count
from fedseg.segmentation.start import Source, fit_weights, read_weights
from fedseg.segmentation.training import set_threads

__all__ = ["app", "run_study"]

log = logging.getLogger("fedseg.server")

app = ServerApp()


class StudyFailed(AppExitException):
    """Ends the run as failed, with one line in Flower's log instead of a traceback."""

    exit_code = ExitCode.SERVERAPP_EXCEPTION

    @property
    def __traceback__(self) -> None:
        """Hide where it came from: the message says all that a user needs."""

    @__traceback__.setter
    def __traceback__(self, value: object) -> None:
        """Ignore what context managers set on the way out."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study."""
    show_logs()
    try:
        run_study(grid, context)
    except FedSegError as error:
        print(f"fedseg: {error}", file=sys.stderr, flush=True)
        raise StudyFailed(str(error)) from None


def run_study(grid: Grid, context: Context) -> RunFolder:
    """Run the study, or go on with one, and return its folder.

    Raises:
        FedSegError: It can't start or go on.
    """
    study = StudyConfig.from_run_config(context.run_config)
    set_threads(None)
    begin = _resumed if study.output.resume else _new
    federation = begin(grid, study)
    folder = federation.folder
    log.info("run folder: %s", folder.path)
    log.info("%d sites: %s", *(len(federation.sites), ", ".join(s.name for s in federation.sites)))
    log.info("%s with %d parameters", *(federation.plan.model, parameter_count(federation.network)))
    _log_plan(federation.plan)
    sites = {s.name: {"verified": s.verified, "simulated": s.simulated} for s in federation.sites}
    folder.update_manifest(status="running", error=None, sites=sites)
    greeted = {s.name: s.receipt.entry() for s in federation.sites if s.receipt}
    folder.add_received([e for name, entry in greeted.items() for e in outside_rounds(name, entry)])
    folder.add_flower_run(context.run_id)
    try:
        with tracking(folder.path, federation.study) as federation.tell:
            history = run_rounds(federation)
        personal = personal_models(federation) if federation.study.federation.personal else {}
    except BaseException as error:
        folder.update_manifest(status="failed", error=str(error) or type(error).__name__)
        _report(federation, None)
        raise
    rest = take_unread(federation, federation.progress.round)
    unwaited = [e for one in rest for e in outside_rounds(one["site"], one["received"])]
    folder.add_received([*federation.received, *unwaited])
    models = sorted(folder.path.glob("model-*.safetensors"))
    hashes = {path.name: sha256_of(path) for path in models}
    folder.update_manifest(status="completed", sha256=hashes, **personal)
    print(result_table(history), flush=True)
    _say_failed(history)
    _say_personal(personal)
    print(f"Run folder: {folder.path}", flush=True)
    report = _report(federation, federation.network)
    if report is not None:
        print(f"Report: {report}", flush=True)
    return folder


def _report(federation: Federation, network: nn.Module | None) -> Path | None:
    simulated = all(site.simulated for site in federation.sites)
    return report_run(
        federation.folder.path, network, federation.plan, federation.study, simulated=simulated
    )


def _new(grid: Grid, study: StudyConfig) -> Federation:
    """Find the sites, plan by their fingerprints, make the run folder."""
    # Planned without fingerprints first: a name or size that can't be is an error before a site
    # is asked for anything.
    plan = make_plan(study)
    network, strategy = _parts(study, plan)
    check_backend(study.train)
    source = _source(study)
    sites = _enough_sites(grid, study)
    check_privacy(study, network, plan, sites=len(sites))
    fingerprints: dict[str, Fingerprint] = {}
    received: list[dict[str, Any]] = []
    if needs_fingerprints(study):
        fingerprints, received = collect_fingerprints(grid, sites, study)
        plan = make_plan(study, list(fingerprints.values()))
        network, strategy = _parts(study, plan)
        check_privacy(study, network, plan, sites=len(sites))
    if source is not None:
        for note in fit_weights(network, source, allow_partial=study.model.init_partial):
            log.info("model.init-from: %s", note)
        if study.federation.shared != "all":
            log.warning("model.init-from: layers that stay at the sites start from the seed there")
    shared = shared_scans(fingerprints)
    folder = RunFolder.create(study, plan, new_run_id())
    folder.update_manifest(
        seed=study.train.seed,
        parameters=parameter_count(network),
        fingerprints=sorted(fingerprints),
        shared_scans=[[*pair, count] for pair, count in shared.items()],
    )
    folder.add_received(received)
    for (one, other), count in shared.items():
        log.warning("%s and %s both hold %d scans: leave them out at one", one, other, count)
    return _federation(grid, study, plan, sites, network, strategy, folder)


def _resumed(grid: Grid, study: StudyConfig) -> Federation:
    """Open a run's folder and take up its checkpoint; nothing is planned anew."""
    run = resume(study, typed=grid.run.override_config)
    network, strategy = _parts(run.study, run.plan)
    sites = _enough_sites(grid, run.study, least=run.checkpoint.progress.sites)
    check_privacy(run.study, network, run.plan, sites=len(sites))
    network.load_state_dict(run.checkpoint.model)
    restore_strategy(strategy, run.checkpoint.strategy)
    federation = _federation(grid, run.study, run.plan, sites, network, strategy, run.folder)
    federation.progress = run.checkpoint.progress
    log.info("goes on after round %d", federation.progress.round)
    return federation


def _federation(
    grid: Grid,
    study: StudyConfig,
    plan: Plan,
    sites: list[KnownSite],
    network: nn.Module,
    strategy: Strategy,
    folder: RunFolder,
) -> Federation:
    return Federation(
        grid=grid,
        study=study,
        plan=plan,
        sites=sites,
        network=network,
        strategy=strategy,
        reduce=reducer_of(study, tumor_rows=tumor_rows(study, network, plan)),
        folder=folder,
        evaluate=server_evaluation(study, plan, simulated=all(site.simulated for site in sites)),
    )


def _enough_sites(grid: Grid, study: StudyConfig, *, least: int = 0) -> list[KnownSite]:
    """Find the sites; `least` are waited for, up to the deadline, where the study names none."""
    sites = find_sites(grid, study, least=least)
    needed = least_sites(study)
    if len(sites) < needed:
        raise StudyError(
            f"federation.strategy: '{study.federation.strategy}' got {len(sites)} sites; expected "
            f"at least {needed}; take another strategy or a smaller federation.malicious-sites"
        )
    return sites


def _say_failed(history: Sequence[Mapping[str, Any]]) -> None:
    failed = [line for line in history if "failed" in line]
    if failed:
        print(
            f"{len(failed)} of {history[-1]['round']} rounds failed and left the model as it was: "
            + "; ".join(f"round {line['round']}: {line['failed']}" for line in failed),
            flush=True,
        )


def _say_personal(entries: Mapping[str, Mapping[str, Any]]) -> None:
    each, summed = entries.get("personal", {}), entries.get("personal_sum", {})
    kept = [name for name, entry in each.items() if entry["kept"]]
    count, sites = (summed["kept"], summed["sites"]) if summed else (len(kept), len(each))
    if sites:
        print(
            f"Personal model better than the global one on its own held-out cases at "
            f"{count} of {sites} sites{': ' if kept else ''}{', '.join(kept)}",
            flush=True,
        )


def _log_plan(plan: Plan) -> None:
    spacing, patch = (
        " x ".join(f"{n:g}" for n in part) for part in (plan.spacing, plan.patch_size)
    )
    low, high = plan.ct_window
    log.info(
        "plan: %s mm, patch %s, batch %d, CT window %g to %g HU; reasons in plan.json",
        *(spacing, patch, plan.batch_size, low, high),
    )


def _parts(study: StudyConfig, plan: Plan) -> tuple[nn.Module, Strategy]:
    """Resolve every name of the study before a site is asked for anything."""
    try:
        resolve("federation.weighting", study.federation.weighting, WEIGHTINGS)
        resolve("train.loss", study.train.loss, LOSSES)
        check_compatible(study)
        if study.privacy.mode != "none":
            check_accountant()
        check_strategy(study)
        check_monitor(study.federation.monitor)
        check_trackers(study)
        return _initial_network(study, plan), make_strategy(study)
    except ModuleNotFoundError as error:
        raise StudyError(
            f"package {error.name} isn't installed at the SuperLink; install it there and at "
            "every site, or add it to fab-include"
        ) from None


def _initial_network(study: StudyConfig, plan: Plan) -> nn.Module:
    """Build the global model and check by it that patch and network fit."""
    check_patch(plan, levels_matter=not is_custom(plan.model))
    network = build_model(plan, seed=study.train.seed)
    if is_custom(plan.model):
        check_logits(network, plan)
    return network


def _source(study: StudyConfig) -> Source | None:
    """Read the weights to start from, before a site is asked for anything."""
    if not study.model.init_from:
        return None
    return read_weights(study.model.init_from, runs=Path(study.output.dir))
