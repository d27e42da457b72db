"""The rounds: send weights, collect updates, average, evaluate, write down."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.plan import REGIONS, Plan
from fedseg.errors import REASONS, Reason, StudyError
from fedseg.federation.exchange import Arrival, exchange
from fedseg.federation.reduce import spool, weighted_mean
from fedseg.federation.run_folder import RunFolder
from fedseg.federation.sites import KnownSite
from fedseg.federation.strategies import next_state, train_config
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import (
    ARRAYS,
    BUFFERS,
    CONFIG,
    TRAIN_METRICS,
    Answer,
    Task,
    array_bytes,
    read_answer,
    state_to_arrays,
    update_fits,
)
from fedseg.registry import resolve
from fedseg.segmentation.metrics import add, empty_sums, summarise
from fedseg.segmentation.model_file import save_model
from fedseg.segmentation.models import split_state

__all__ = ["Federation", "ServerEvaluation", "Summary", "run_rounds"]

log = logging.getLogger(__name__)

Summary = dict[str, float | int | None]
ServerEvaluation = Callable[[nn.Module], dict[str, Summary]]


@dataclass
class Federation:
    """All that the rounds need.

    Attributes:
        grid: Flower's grid.
        study: The study config.
        plan: The plan.
        sites: The sites, in order of their names.
        network: The global model.
        strategy: Flower's strategy.
        folder: The run folder.
        evaluate: Scores a network on the server's own cases: `global`, `unseen`.
        best: Score of the best model so far.
    """

    grid: Grid
    study: StudyConfig
    plan: Plan
    sites: list[KnownSite]
    network: nn.Module
    strategy: Strategy
    folder: RunFolder
    evaluate: ServerEvaluation
    best: float = -1.0


def run_rounds(federation: Federation) -> list[dict[str, Any]]:
    """Run all rounds and return the lines of `history.jsonl`.

    Raises:
        StudyError: Fewer good updates than `federation.min-sites` came in a round.
    """
    rounds = federation.study.federation.rounds
    first = {"round": 0, **federation.evaluate(federation.network), "federated": {}, "sites": {}}
    history = [_line(first, seconds=0.0)]
    federation.folder.append_history(history[0])
    _save(federation, 0, {})
    for number in range(1, rounds + 1):
        began = time.monotonic()
        line = _train_round(federation, number)
        if number == rounds or number % federation.study.federation.evaluate_every == 0:
            _evaluate_round(federation, number, line)
        history.append(_line(line, seconds=time.monotonic() - began))
        federation.folder.append_history(history[-1])
        _save(federation, number, history[-1])
        log.info("%s", _headline(history[-1], rounds))
    return history


def _line(line: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    defaults = {"global": {}, "bytes_up": 0, "bytes_down": 0, "privacy": None}
    return {"round": line["round"], **defaults, **line, "seconds": round(seconds, 3)}


def _messages(federation: Federation, config: ConfigRecord, kind: str) -> dict[str, Message]:
    shared, buffers = split_state(federation.network)
    content = RecordDict({ARRAYS: state_to_arrays(shared), CONFIG: config})
    if buffers:
        content[BUFFERS] = state_to_arrays(buffers)
    return {
        site.name: Message(content, dst_node_id=site.node_id, message_type=kind)
        for site in federation.sites
    }


def _task(federation: Federation, number: int) -> ConfigRecord:
    return Task(
        study_run=federation.folder.run_id,
        config_digest=federation.study.digest(),
        plan=federation.plan.to_json(),
        round_number=number,
        rounds=federation.study.federation.rounds,
    ).to_record()


def _train_round(federation: Federation, number: int) -> dict[str, Any]:
    """One round of training; moves the global model."""
    nodes = [site.node_id for site in federation.sites]
    shared, buffers = split_state(federation.network)
    before = {name: tensor.clone() for name, tensor in shared.items()}
    config = train_config(federation.strategy, number, before, _task(federation, number), nodes)
    messages = _messages(federation, config, "train")
    template = next(iter(messages.values()))
    down = array_bytes(template.content.array_records[ARRAYS]) * len(messages)
    spooled = federation.folder.path / "checkpoint" / "spool" / str(number)
    sites: dict[str, dict[str, Any]] = {}
    paths: dict[str, Path] = {}
    weights: dict[str, float] = {}
    weigh = resolve("federation.weighting", federation.study.federation.weighting, WEIGHTINGS)
    deadline = federation.study.federation.round_deadline
    for arrival in exchange(federation.grid, messages, deadline=deadline):
        answer = _judged(arrival, before)
        if not isinstance(answer, tuple):
            sites[arrival.site] = _site_line(answer, arrival)
            continue
        answer, update = answer
        weight = float(weigh(answer.metrics))
        paths[arrival.site] = spool(spooled, arrival.site, update)
        weights[arrival.site] = weight
        sites[arrival.site] = _site_line(answer, arrival, weight=weight)
    _report_losses(sites, number)
    wanted = federation.study.federation.min_sites
    if len(paths) < wanted:
        line = _line({"round": number, "federated": {}, "sites": _sorted(sites)}, seconds=0.0)
        federation.folder.append_history(line)
        reasons = "; ".join(f"{name}: {_why(site)}" for name, site in _sorted(sites).items())
        raise StudyError(
            f"round {number}: got {len(paths)} good updates; expected at least {wanted} "
            f"(federation.min-sites); {reasons}"
        )
    _check_weights(weights, federation.study.federation.weighting)
    mean = weighted_mean(paths, weights)
    moved = next_state(federation.strategy, number, before, mean, template)
    federation.network.load_state_dict({**moved, **buffers})
    shutil.rmtree(spooled.parent, ignore_errors=True)
    return {
        "round": number,
        "sites": _sorted(sites),
        "federated": {},
        "bytes_up": sum(site["bytes_up"] for site in sites.values()),
        "bytes_down": down,
    }


def _check_weights(weights: Mapping[str, float], name: str) -> None:
    for site, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise StudyError(
                f"federation.weighting: '{name}' gave {site} {weight}; expected at least 0"
            )
    if not sum(weights.values()) > 0:
        raise StudyError(
            f"federation.weighting: '{name}' gave every site weight 0; expected one above 0"
        )


def _judged(
    arrival: Arrival, like: Mapping[str, torch.Tensor]
) -> tuple[Answer, dict[str, torch.Tensor]] | Answer:
    """Read a reply to train and check its update alone."""
    if arrival.message is None:
        return Answer(status="late", reason=Reason.DEADLINE)
    answer = read_answer(arrival.message, declared=TRAIN_METRICS)
    if answer.status != "ok":
        return answer
    complete = set(answer.metrics) == set(TRAIN_METRICS) and answer.metrics["cases"] > 0
    if answer.update is None or not complete:
        return Answer(status="failed", reason=Reason.BAD_UPDATE)
    update = update_fits(answer.update, like)
    if isinstance(update, Reason):
        return Answer(status="failed", reason=update, bytes_up=answer.bytes_up)
    return answer, update


def _site_line(answer: Answer, arrival: Arrival, *, weight: float = 0.0) -> dict[str, Any]:
    return {
        "status": answer.status,
        "reason": answer.reason.value if answer.reason else None,
        **({"detail": answer.detail} if answer.detail else {}),
        "weight": weight,
        "seconds": round(arrival.seconds, 3),
        "bytes_up": answer.bytes_up,
        "training": dict(answer.metrics),
        "metrics": {},
    }


def _evaluate_round(federation: Federation, number: int, line: dict[str, Any]) -> None:
    """Score the moved model at the sites and, meanwhile, at the server."""
    messages = _messages(federation, _task(federation, number), "evaluate")
    deadline = federation.study.federation.round_deadline
    arrivals = exchange(federation.grid, messages, deadline=deadline)
    line.update(federation.evaluate(federation.network))
    parts = []
    for arrival in arrivals:
        answer = Answer(status="late", reason=Reason.DEADLINE)
        if arrival.message is not None:
            answer = read_answer(arrival.message, declared=tuple(empty_sums()))
        if answer.status == "ok":
            parts.append((arrival.site, answer.metrics))
            site = line["sites"].setdefault(arrival.site, {})
            site["metrics"] = summarise(add([answer.metrics]))
        else:
            name, reason = arrival.site, answer.reason or Reason.ERROR
            log.warning("round %d: %s gave no metrics: %s", number, name, REASONS[reason])
    line["federated"] = summarise(add(sums for _, sums in sorted(parts)))


def _score(line: Mapping[str, Any]) -> float | None:
    """Mean Dice of the regions, on the server's cases where it has any, else on the sites'."""
    for scope in ("global", "federated"):
        found = [line.get(scope, {}).get(f"{region}.dice") for region in REGIONS]
        known = [value for value in found if value is not None]
        if known:
            return float(sum(known) / len(known))
    return None


def _save(federation: Federation, number: int, line: Mapping[str, Any]) -> None:
    state = federation.network.state_dict()
    notes = {"run": federation.folder.run_id, "round": str(number)}
    save_model(federation.folder.path / "model-last.safetensors", state, federation.plan, **notes)
    score = _score(line) if line else None
    if score is not None and score > federation.best:
        federation.best = score
        save_model(
            federation.folder.path / "model-best.safetensors", state, federation.plan, **notes
        )


def _why(site: Mapping[str, Any]) -> str:
    if site["status"] == "ok":
        return "ok"
    detail = f" ({site['detail']})" if site.get("detail") else ""
    return f"{site['status']}, {REASONS[Reason(site['reason'] or 'error')]}{detail}"


def _report_losses(sites: Mapping[str, Mapping[str, Any]], number: int) -> None:
    for name, site in _sorted(sites).items():
        if site["status"] != "ok":
            log.warning("round %d without %s: %s", number, name, _why(site))


def _sorted(sites: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sites[name] for name in sorted(sites)}


def _headline(line: Mapping[str, Any], rounds: int) -> str:
    parts = [f"round {line['round']}/{rounds} in {line['seconds']:.0f} s"]
    losses = [s["training"]["loss"] for s in line["sites"].values() if s.get("training")]
    if losses:
        parts.append(f"loss {sum(losses) / len(losses):.3f}")
    for scope in ("global", "federated"):
        for region in REGIONS:
            value = line[scope].get(f"{region}.dice")
            if value is not None:
                parts.append(f"{scope} {region} Dice {value:.3f}")
    return " · ".join(parts)
