"""The ClientApp: translate a message, call the library, answer. Nothing else leaves a site."""

import functools
import logging
import os
import shutil
from collections.abc import Callable

# Waiting OpenMP threads that spin stall a step for seconds when other work shares the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.measure import site_fingerprint
from fedseg.data.node import Site, SiteCases, load_cases, open_site, own_name
from fedseg.data.patches import batches
from fedseg.data.plan import Plan
from fedseg.errors import ConfigError, FedSegError, ModelError, Reason, SiteError
from fedseg.logs import show_logs
from fedseg.messages import (
    ARRAYS,
    BUFFERS,
    Greeting,
    Task,
    answer_message,
    arrays_to_state,
    greeting_message,
)
from fedseg.registry import is_custom, resolve
from fedseg.segmentation.evaluation import evaluate_cases
from fedseg.segmentation.losses import LOSSES
from fedseg.segmentation.models import build_model, split_state
from fedseg.segmentation.optimizer_state import load_optimizer, save_optimizer
from fedseg.segmentation.training import (
    FitReport,
    choose_device,
    fit,
    log_progress,
    make_optimizer,
    set_threads,
    steps_in_round,
)

__all__ = ["app"]

log = logging.getLogger("fedseg.site")

app = ClientApp()

Work = Callable[[Message, Context, StudyConfig], Message]


def answered(work: Work) -> Callable[[Message, Context], Message]:
    """Turn whatever goes wrong into a reason code; the story stays in the site's own log."""

    @functools.wraps(work)
    def handler(message: Message, context: Context) -> Message:
        show_logs()
        try:
            try:
                study = StudyConfig.from_run_config(context.run_config)
            except ConfigError as error:
                raise SiteError(Reason.CONFIG_MISMATCH, str(error)) from None
            return work(message, context, study)
        except SiteError as error:
            reason = error.reason
            log.error("%s: %s", reason.value, error)
        except ConfigError as error:
            reason = Reason.PLAN
            log.error("%s", error)
        except FedSegError as error:
            reason = Reason.MODEL if isinstance(error, ModelError) else Reason.DATA
            log.error("%s", error)
        except ModuleNotFoundError as error:
            reason = Reason.MODEL_MISSING
            log.error("package %s isn't installed", error.name)
        except (torch.OutOfMemoryError, MemoryError):
            reason = Reason.OUT_OF_MEMORY
            log.error("out of memory")
        except Exception:
            reason = Reason.ERROR
            log.exception("a task failed")
        status = "refused" if reason.refused else "failed"
        if message.metadata.message_type == "query.hello":
            return greeting_message(message, _apology(context, reason))
        return answer_message(message, status=status, reason=reason)

    return handler


def _apology(context: Context, reason: Reason) -> Greeting:
    """Say hello all the same, so that people see which site can't take part."""
    node = context.node_config
    simulated = "data-dir" not in node and "num-partitions" in node
    return Greeting(
        name=own_name(node),
        simulated=simulated,
        sites=int(node["num-partitions"]) if simulated else 0,
        reason=reason,
    )


@app.query("hello")
@answered
def hello(message: Message, context: Context, study: StudyConfig) -> Message:
    """Say who this site is; phantoms aren't made yet, so that a study starts at once."""
    site = open_site(context.node_config, study, make_phantoms=False)
    greeting = Greeting(name=site.name, simulated=site.simulated, sites=site.sites)
    return greeting_message(message, greeting)


@app.query("fingerprint")
@answered
def fingerprint(message: Message, context: Context, study: StudyConfig) -> Message:
    """Answer with the histograms that the site's policy lets leave."""
    found = site_fingerprint(open_site(context.node_config, study))
    return answer_message(message, status="ok", fingerprint=found.to_json())


@app.train()
@answered
def train(message: Message, context: Context, study: StudyConfig) -> Message:
    """Train the global model on the site's cases and answer with the change."""
    task, plan, site = _accept(message, context, study)
    cases = _cases(site, plan, study)
    policy = site.config.policy
    if len(cases.training) + len(cases.validation) < policy.min_cases:
        raise SiteError(Reason.POLICY_MIN_CASES)
    device = _device(site)
    network, state = _network(message, plan, device)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if policy.max_bytes is not None and size > policy.max_bytes:
        raise SiteError(Reason.POLICY_MAX_BYTES)
    report = _fit(network, cases, plan, task, site, study, device)
    trained = network.state_dict()
    update = {name: trained[name].cpu() - before for name, before in state.items()}
    if not all(bool(torch.isfinite(change).all()) for change in update.values()):
        raise SiteError(Reason.NOT_FINITE)
    metrics = {
        "cases": len(cases.training),
        "patches": report.patches,
        "steps": report.steps,
        "loss": report.loss,
        "seconds": report.seconds,
        "skipped": cases.skipped,
    }
    return answer_message(message, status="ok", metrics=metrics, update=update)


def _fit(
    network: nn.Module,
    cases: SiteCases,
    plan: Plan,
    task: Task,
    site: Site,
    study: StudyConfig,
    device: torch.device,
) -> FitReport:
    """Train in place, with the optimiser as the site left it after the round before."""
    keep = study.train.optimizer_state == "keep"
    kept = site.config.cache / "state" / task.study_run / (site.name or "site")
    optimizer = make_optimizer(network, study.train)
    if keep:
        load_optimizer(optimizer, kept / f"round-{task.round_number - 1}")
    steps = steps_in_round(study.train, len(cases.training), plan.batch_size)
    # Randomness comes from (seed, site, round), never from process state.
    seed = [study.train.seed, task.round_number, *site.name.encode()]
    report = fit(
        network,
        batches(
            cases.training,
            steps=steps,
            batch_size=plan.batch_size,
            patch_size=plan.patch_size,
            foreground=study.train.foreground,
            augmentation=study.train.augmentation,
            rng=np.random.default_rng(seed),
        ),
        resolve("train.loss", study.train.loss, LOSSES),
        study.train,
        steps=steps,
        round_number=task.round_number,
        rounds=task.rounds,
        annotated=site.config.labels,
        proximal_mu=task.proximal_mu,
        device=device,
        optimizer=optimizer,
        on_step=log_progress(site.name or "this site", task.round_number),
    )
    if task.round_number >= task.rounds:
        shutil.rmtree(kept, ignore_errors=True)
    elif keep:
        save_optimizer(optimizer, kept / f"round-{task.round_number}")
    return report


@app.evaluate()
@answered
def evaluate(message: Message, context: Context, study: StudyConfig) -> Message:
    """Score the global model on the site's held-out cases and answer with sums and counts."""
    _, plan, site = _accept(message, context, study)
    cases = _cases(site, plan, study)
    device = _device(site)
    network, _ = _network(message, plan, device)
    sums = evaluate_cases(
        network,
        cases.validation,
        plan,
        device=device,
        precision=study.train.precision,
        annotated=site.config.labels,
    )
    sums["skipped"] = float(cases.skipped)
    return answer_message(message, status="ok", metrics=sums)


def _accept(message: Message, context: Context, study: StudyConfig) -> tuple[Task, Plan, Site]:
    """Read the task and check it against the site's own config and policy."""
    task = Task.from_message(message)
    if task.config_digest != study.digest():
        raise SiteError(Reason.CONFIG_MISMATCH)
    plan = Plan.from_json(task.plan)
    site = open_site(context.node_config, study)
    custom = [name for name in (plan.model, study.train.loss) if is_custom(name)]
    if custom and not site.config.policy.allow_custom_code:
        raise SiteError(Reason.POLICY_CUSTOM_CODE)
    set_threads(site.config.threads)
    return task, plan, site


def _cases(site: Site, plan: Plan, study: StudyConfig) -> SiteCases:
    cases = load_cases(
        site,
        plan,
        validation_fraction=study.train.validation_fraction,
        seed=study.train.seed,
    )
    if not cases.training:
        raise SiteError(Reason.NO_CASES)
    return cases


def _device(site: Site) -> torch.device:
    try:
        return choose_device(site.config.device)
    except ConfigError as error:
        raise SiteError(Reason.SITE_CONFIG, str(error)) from None


@functools.lru_cache(maxsize=1)
def _built(plan_json: str, device: str) -> nn.Module:
    """Build once a process: simulated sites share long-lived workers."""
    network = build_model(Plan.from_json(plan_json))
    placed: nn.Module = network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return placed


def _network(
    message: Message, plan: Plan, device: torch.device
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Load the global weights; also return the shared floats as they came."""
    network = _built(plan.to_json(), str(device))
    shared, fixed = split_state(network)
    records = message.content.array_records
    try:
        state = arrays_to_state(records[ARRAYS], shared)
        buffers = arrays_to_state(records[BUFFERS], fixed) if fixed else {}
    except (KeyError, ValueError) as error:
        raise SiteError(Reason.MODEL, f"the server's weights don't fit: {error}") from None
    network.load_state_dict({**state, **buffers})
    return network, state
