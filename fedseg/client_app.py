"""The ClientApp: translate a message, call the library, answer. Nothing else leaves a site."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

# Waiting OpenMP threads that spin stall a step for seconds when other work shares the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedseg.arrays import arrays_to_state
from fedseg.config import StudyConfig
from fedseg.data.measure import site_fingerprint
from fedseg.data.node import Site, SiteCases, load_cases, open_site, own_name
from fedseg.data.plan import Plan
from fedseg.errors import ConfigError, FedSegError, ModelError, ProtocolError, Reason, SiteError
from fedseg.federation.compression import scheme_of
from fedseg.federation.flat import layout_of
from fedseg.federation.secure_site import SECURE_STEPS, forget, masked_answer, received
from fedseg.federation.site_round import (
    kept_folder,
    local_layers,
    packed,
    personal_sums,
    train_at_site,
)
from fedseg.logs import show_logs
from fedseg.messages import (
    ARRAYS,
    BUFFERS,
    Greeting,
    Task,
    answer_message,
    greeting_message,
    stored_study,
)
from fedseg.registry import is_custom
from fedseg.report.at_end import report_site
from fedseg.segmentation.evaluation import score_cases
from fedseg.segmentation.inference import out_of_memory
from fedseg.segmentation.metrics import add
from fedseg.segmentation.models import build_model
from fedseg.segmentation.norms import place
from fedseg.segmentation.sharing import split_state
from fedseg.segmentation.training import choose_device, set_threads

__all__ = ["app"]

log = logging.getLogger("fedseg.site")

app = ClientApp()

Work = Callable[[Message, Context, StudyConfig], Message]

_REASONS = {ModelError: Reason.MODEL, ProtocolError: Reason.SECURE_AGGREGATION}


def answered(work: Work) -> Callable[[Message, Context], Message]:
    """Turn whatever goes wrong into a reason code; the story stays in the site's own log."""

    @functools.wraps(work)
    def handler(message: Message, context: Context) -> Message:
        show_logs()
        try:
            return work(message, context, _study(message, context))
        except SiteError as error:
            reason = error.reason
            log.error("%s: %s", reason.value, error)
        except ConfigError as error:
            reason = Reason.PLAN
            log.error("%s", error)
        except FedSegError as error:
            reason = _reason(error)
            log.error("%s", error)
        except ModuleNotFoundError as error:
            reason = Reason.MODEL_MISSING
            log.error("package %s isn't installed", error.name)
        except Exception as error:
            if out_of_memory(error):
                reason = Reason.OUT_OF_MEMORY
                log.error("out of memory: %s", error)
            else:
                reason = Reason.ERROR
                log.exception("a task failed")
        status = "refused" if reason.refused else "failed"
        if message.metadata.message_type == "query.hello":
            return greeting_message(message, _apology(context, reason))
        return answer_message(message, status=status, reason=reason)

    return handler


def _reason(error: FedSegError) -> Reason:
    found = (reason for kind, reason in _REASONS.items() if isinstance(error, kind))
    return next(found, Reason.DATA)


def _study(message: Message, context: Context) -> StudyConfig:
    """Flower's run config; in a resumed run the config it began with, which the message carries."""
    stored = stored_study(message)
    try:
        if stored is not None:
            return StudyConfig.from_json(stored)
        return StudyConfig.from_run_config(context.run_config)
    except ConfigError as error:
        raise SiteError(Reason.CONFIG_MISMATCH, str(error)) from None


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


for _action, _step in SECURE_STEPS.items():
    app.query(_action)(answered(_step))


@app.train()
@answered
def train(message: Message, context: Context, study: StudyConfig) -> Message:
    """Train the global model on the site's cases and answer with the change."""
    task, plan, site = _accept(message, context, study)
    secure = received(message, context, study, site)
    cases = _cases(site, plan, study)
    if len(cases.training) + len(cases.validation) < site.config.policy.min_cases:
        raise SiteError(Reason.POLICY_MIN_CASES)
    device = _device(site)
    kept = kept_folder(site, task.study_run, task.round_number - 1)
    network, shared = _network(message, plan, study, kept, device)
    _check_size(site, scheme_of(study.federation).bytes(layout_of(shared).size))
    trained = train_at_site(network, cases, plan, task, site, study, device)
    after = network.state_dict()
    update = {name: after[name].cpu() - before for name, before in shared.items()}
    if not all(bool(torch.isfinite(change).all()) for change in update.values()):
        raise SiteError(Reason.NOT_FINITE)
    metrics = {
        "cases": len(cases.training),
        "voxels": sum(case.image.size for case in cases.training),
        "annotated": len(site.config.labels),
        "skipped": cases.skipped,
        "patches": trained.report.patches,
        "steps": trained.report.steps,
        "first_loss": trained.first_loss,
        "loss": trained.report.loss,
        "seconds": trained.report.seconds,
    }
    if secure is not None:
        return masked_answer(message, context, study, site, secure, update, metrics)
    parts = packed(update, study, site, task)
    return answer_message(message, status="ok", metrics=metrics, update=parts)


def _check_size(site: Site, size: int) -> None:
    most = site.config.policy.max_bytes
    if most is not None and size > most:
        raise SiteError(Reason.POLICY_MAX_BYTES)


@app.evaluate()
@answered
def evaluate(message: Message, context: Context, study: StudyConfig) -> Message:
    """Score the global model on the site's held-out cases and answer with sums and counts."""
    task, plan, site = _accept(message, context, study)
    forget(context, task.round_number)
    cases = _cases(site, plan, study)
    device = _device(site)
    kept = kept_folder(site, task.study_run, task.round_number)
    network, _ = _network(message, plan, study, kept, device)
    last = task.final or task.round_number >= task.rounds
    score = functools.partial(
        score_cases,
        network,
        cases.validation,
        plan,
        device=device,
        precision=study.train.precision,
        annotated=site.config.labels,
        distances=last,
    )
    scored = score()
    sums = {**add(scored), "skipped": float(cases.skipped)}
    if task.final or (last and not study.federation.personal):
        report_site(site, task, plan, study, network, cases.validation, scored, device=device)
    if task.final:
        sums.update(personal_sums(network, plan, site, task, sums, lambda: add(score())))
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
    return place(build_model(Plan.from_json(plan_json)), torch.device(device))


def _network(
    message: Message, plan: Plan, study: StudyConfig, kept: Path, device: torch.device
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Load the global weights and this site's local layers; also return the shared as they came."""
    network = _built(plan.to_json(), str(device))
    state = split_state(network, study.federation.shared)
    records = message.content.array_records
    dtype = torch.float16 if study.federation.download == "fp16" else None
    like = {
        name: torch.empty_like(t, device="meta", dtype=dtype) for name, t in state.shared.items()
    }
    try:
        arrived = arrays_to_state(records[ARRAYS], like)
        fixed = arrays_to_state(records[BUFFERS], state.fixed) if state.fixed else {}
    except (KeyError, ValueError) as error:
        raise SiteError(Reason.MODEL, f"the server's weights don't fit: {error}") from None
    shared = {name: t.to(state.shared[name].dtype) for name, t in arrived.items()}
    local = local_layers(state.local, plan, study, kept)
    network.load_state_dict({**shared, **local, **fixed})
    return network, shared
