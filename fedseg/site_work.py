"""What a site does when it is asked to train, to evaluate or for a fingerprint.

Flower starts a process for each message to a real site; only these need torch and MONAI, which
take seconds to import, so `client_app` imports this when one of them comes.
"""

import functools
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context, Message
from torch import nn

from fedseg.arrays import arrays_to_state
from fedseg.config import StudyConfig
from fedseg.data.measure import site_fingerprint
from fedseg.data.node import open_site
from fedseg.data.plan import Plan
from fedseg.data.prepared_cases import SiteCases, load_cases
from fedseg.data.sites import Site
from fedseg.errors import ConfigError, Reason, SiteError
from fedseg.federation.compression import scheme_of
from fedseg.federation.egress import Reply
from fedseg.federation.flat import layout_of, unflatten
from fedseg.federation.masked import check_weight, masked_answer, masked_sums
from fedseg.federation.secure_site import received
from fedseg.federation.site_privacy import protect
from fedseg.federation.site_round import (
    kept_folder,
    local_layers,
    packed,
    personal_sums,
    sent_norm,
    train_at_site,
)
from fedseg.federation.site_spending import charge, check_spending
from fedseg.messages import ARRAYS, BUFFERS, Task, answer_message
from fedseg.privacy.policy import enough_cases
from fedseg.report.at_end import report_site
from fedseg.segmentation.evaluation import score_cases
from fedseg.segmentation.layers import place
from fedseg.segmentation.metrics import add
from fedseg.segmentation.models import build_model
from fedseg.segmentation.sharing import split_state
from fedseg.segmentation.training import choose_device, set_threads, steps_in_round

__all__ = ["evaluate", "fingerprint", "train"]


def fingerprint(message: Message, context: Context, study: StudyConfig) -> Message:
    """Answer with the histograms that the site's policy lets leave."""
    found = site_fingerprint(open_site(context.node_config, study))
    return answer_message(message, status="ok", fingerprint=found.to_json())


def train(message: Message, context: Context, study: StudyConfig) -> Reply:
    """Train the global model on the site's cases and answer with the change."""
    task, plan, site = _accept(message, context, study)
    secure = received(message, context, study, "train")
    cases = _cases(site, plan, study)
    enough_cases(site.config.policy, training=len(cases.training))
    planned = _planned(cases, plan, study, site)
    if secure is not None:
        check_weight(message, study, secure, planned)
    check_spending(site, study, plan)
    device = _device(site)
    kept = kept_folder(site, task.study_run, task.round_number - 1)
    network, shared = _network(message, plan, study, kept, device)
    _check_size(site, scheme_of(study.federation).bytes(layout_of(shared).size))
    trained = train_at_site(network, cases, plan, task, site, study, device)
    after = network.state_dict()
    update = {name: after[name].cpu() - before for name, before in shared.items()}
    protected = protect(update, study)
    charge(site, study, plan, task)
    metrics = {
        **planned,
        "skipped": cases.skipped,
        "patches": trained.report.patches,
        "steps": trained.report.steps,
        "first_loss": trained.first_loss,
        "loss": trained.report.loss,
        "seconds": trained.report.seconds,
    }
    if secure is not None:
        reply = masked_answer(message, context, study, site, secure, protected.update, metrics)
        return replace(reply, notes={**reply.notes, **protected.notes})
    parts = packed(protected.update, study, site, task)
    answer = answer_message(message, status="ok", metrics=metrics, update=parts)
    norm = sent_norm(parts, protected.update, study)
    return Reply(message=answer, notes={"norm": norm, **protected.notes})


def _planned(cases: SiteCases, plan: Plan, study: StudyConfig, site: Site) -> dict[str, float]:
    """Numbers of the training that are known before it."""
    known: dict[str, float] = {
        "cases": len(cases.training),
        "voxels": sum(case.image.size for case in cases.training),
        "annotated": len(site.config.labels),
    }
    if study.privacy.mode == "record-dp":  # its steps are drawn
        return known
    steps = steps_in_round(study.train, len(cases.training), plan.batch_size)
    return {**known, "steps": steps, "patches": steps * plan.batch_size}


def _check_size(site: Site, size: int) -> None:
    most = site.config.policy.max_bytes
    if most is not None and size > most:
        raise SiteError(Reason.POLICY_MAX_BYTES)


def evaluate(message: Message, context: Context, study: StudyConfig) -> Message | Reply:
    """Score the global model on the site's held-out cases and answer with sums and counts."""
    task, plan, site = _accept(message, context, study)
    secure = received(message, context, study, "final" if task.final else "evaluate")
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
    if secure is not None:
        return masked_sums(message, context, study, site, secure, sums)
    return answer_message(message, status="ok", metrics=sums)


def _accept(message: Message, context: Context, study: StudyConfig) -> tuple[Task, Plan, Site]:
    """Read the task and check that it is this study's."""
    task = Task.from_message(message)
    if task.config_digest != study.digest():
        raise SiteError(Reason.CONFIG_MISMATCH)
    plan = Plan.from_json(task.plan)
    site = open_site(context.node_config, study)
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
    layout = layout_of(state.shared)
    dtype = torch.float16 if study.federation.download == "fp16" else torch.float32
    like = {layout.digest: torch.empty(layout.size, device="meta", dtype=dtype)}
    try:
        vector = arrays_to_state(records[ARRAYS], like)[layout.digest].float()
        fixed = arrays_to_state(records[BUFFERS], state.fixed) if state.fixed else {}
    except (KeyError, ValueError) as error:
        raise SiteError(Reason.MODEL, f"the server's weights don't fit: {error}") from None
    shared = unflatten(vector, layout)
    local = local_layers(state.local, plan, study, kept)
    network.load_state_dict({**shared, **local, **fixed})
    return network, shared
