"""The rounds: train, evaluate, checkpoint, write down; and what is left to do at the end."""

import logging
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedseg.errors import REASONS, Reason, StudyError
from fedseg.federation.checkpoints import Checkpoint, save_checkpoint
from fedseg.federation.exchange import Arrival, exchange, read_arrival
from fedseg.federation.federation import Federation, messages_to, outside_rounds
from fedseg.federation.history import headline, new_line, score
from fedseg.federation.secure_round import secure_personal, secure_scores
from fedseg.federation.sites import find_again
from fedseg.federation.spending import can_pay
from fedseg.federation.strategies import strategy_state
from fedseg.federation.train_round import train_round
from fedseg.messages import PERSONAL, Answer
from fedseg.segmentation.metrics import add, empty_sums, plausible, summarise
from fedseg.segmentation.model_file import save_model

__all__ = ["personal_models", "run_rounds"]

log = logging.getLogger(__name__)


def run_rounds(federation: Federation) -> list[dict[str, Any]]:
    """Run all rounds from where the progress stands; return the lines of `history.jsonl`.

    Raises:
        StudyError: Fewer good updates than `federation.min-sites` came in a round, every round
            failed, or the disk is full.
    """
    settings, progress = federation.study.federation, federation.progress
    if not progress.history:
        progress.sites = len(federation.sites)
        _keep(federation, new_line(0, federation.evaluate(federation.network)))
    for number in range(progress.round + 1, settings.rounds + 1):
        if settings.patience and progress.since_best >= settings.patience:
            log.info("no better model in %d evaluations: training ends", progress.since_best)
            break
        if not can_pay(federation):
            _end_for_privacy(federation)
            break
        began = time.monotonic()
        _find_again(federation)
        line = train_round(federation, number)
        last = number == settings.rounds or not can_pay(federation)
        if last or number % settings.evaluate_every == 0:
            _evaluate_round(federation, number, line)
        progress.round = number
        _keep(federation, new_line(number, line, seconds=time.monotonic() - began))
        log.info("%s", headline(progress.history[-1], settings.rounds))
    _check_any(progress.history)
    return progress.history


def _find_again(federation: Federation) -> None:
    """Take back sites whose SuperNodes were restarted."""
    back = find_again(federation.grid, federation.study, federation.sites)
    for name, site in back.items():
        log.info("%s is there again, as another node", name)
        federation.progress.late.pop(name, None)  # its answer was the old node's to give
        if site.receipt is not None:
            federation.received += outside_rounds(name, site.receipt.entry())
    federation.sites = [back.get(site.name, site) for site in federation.sites]


def _check_any(history: Sequence[Mapping[str, Any]]) -> None:
    """Check that the model moved at all: a round whose sum failed leaves it as it is.

    Raises:
        StudyError: Every round failed.
    """
    trained = [line for line in history if line["round"]]
    failed = [line["failed"] for line in trained if "failed" in line]
    if trained and len(failed) == len(trained):
        raise StudyError(
            f"every round failed ({len(failed)}), the model is as it began; the last: {failed[-1]}"
        )


def _end_for_privacy(federation: Federation) -> None:
    """Say that the budget is spent; the last model is the result, as after any last round."""
    budget, done = federation.study.privacy.max_epsilon, federation.progress.round
    text = f"after round {done}: one more would pass privacy.max-epsilon = {budget:g}"
    log.warning("training ends %s", text)
    federation.folder.update_manifest(ended=text)


def _keep(federation: Federation, line: dict[str, Any]) -> None:
    """Write models, checkpoint and history of a whole round; then its updates may go.

    Raises:
        StudyError: The disk is full or the folder can't be written.
    """
    folder = federation.folder.path
    try:
        _write(federation, line)
    except OSError as error:
        raise StudyError(
            f"{folder}: round {line['round']} can't be saved ({error.strerror or error}); free "
            f"space, then go on with output.resume='{folder.name}'"
        ) from None
    shutil.rmtree(folder / "checkpoint" / "spool", ignore_errors=True)
    federation.tell(line)


def _write(federation: Federation, line: dict[str, Any]) -> None:
    progress, folder = federation.progress, federation.folder
    state = federation.network.state_dict()
    notes = {"run": folder.run_id, "round": str(line["round"])}
    reached = score(line, federation.study.federation.monitor)
    if reached is not None and reached[0] >= progress.best_regions:
        progress.since_best += 1
        if progress.best is None or reached > (progress.best_regions, progress.best):
            (progress.best_regions, progress.best), progress.since_best = reached, 0
            save_model(folder.path / "model-best.safetensors", state, federation.plan, **notes)
    save_model(folder.path / "model-last.safetensors", state, federation.plan, **notes)
    progress.history.append(line)
    kept = strategy_state(federation.strategy)
    checkpoint = Checkpoint(model=state, strategy=kept, progress=progress)
    save_checkpoint(folder.path / "checkpoint", checkpoint)
    folder.append_history(line)


def _evaluate_round(federation: Federation, number: int, line: dict[str, Any]) -> None:
    """Score the moved model at the sites that hold cases out and, meanwhile, at the server."""
    # Sites go by the same rule: surface distances cost a lot of the time of an evaluation.
    last = number == federation.study.federation.rounds

    def at_server() -> None:
        line.update(federation.evaluate(federation.network, distances=last))

    if not federation.study.train.validation_fraction:  # the sites have nothing to score it on
        at_server()
        return
    if federation.study.privacy.secure_aggregation:
        secure_scores(federation, number, line, at_server)
        return
    for name in federation.progress.late:  # still at work: an evaluation would wait behind it
        line["sites"].setdefault(name, {})["no_metrics"] = Reason.DEADLINE.value
    arrivals = _ask(federation, number)
    at_server()
    parts = []
    for name, answer in _answers(arrivals, declared=tuple(empty_sums())):
        if answer.receipt is not None:
            received = line["sites"].setdefault(name, {}).setdefault("received", {})
            received.update(answer.receipt.entry())
        if answer.status == "ok":
            parts.append((name, answer.metrics))
            line["sites"].setdefault(name, {})["metrics"] = summarise(add([answer.metrics]))
        else:
            reason = answer.reason or Reason.ERROR
            line["sites"].setdefault(name, {})["no_metrics"] = reason.value
            log.warning("round %d: %s gave no metrics: %s", number, name, REASONS[reason])
    line["federated"] = summarise(add(sums for _, sums in sorted(parts)))


def _ask(federation: Federation, number: int, *, final: bool = False) -> Iterator[Arrival]:
    """Ask all sites that aren't at work on something else for the model's scores."""
    content = federation.content(federation.task(number, final=final))
    return exchange(
        federation.grid,
        messages_to(federation.free, content, "evaluate"),
        deadline=federation.study.federation.round_deadline,
    )


def _answers(
    arrivals: Iterable[Arrival], *, declared: Collection[str]
) -> Iterator[tuple[str, Answer]]:
    """Each site's sums; those that no cases can have are no answer."""
    for arrival in arrivals:
        answer = read_arrival(arrival, declared=declared)
        if answer.status == "ok" and not plausible(answer.metrics):
            answer = replace(answer, status="failed", reason=Reason.BAD_UPDATE, metrics={})
        yield arrival.site, answer


def personal_models(federation: Federation) -> dict[str, dict[str, Any]]:
    """After the last round: each site compares what it trained last with the global model.

    A site keeps its own as a personal model only where it is better on its own held-out cases; in
    a study that holds none out nobody is asked.

    Returns:
        Entries of the manifest. `personal`: for each site that answered whether it kept one, and
        the metrics of both; under secure aggregation `personal_sum`: the same of all together.
    """
    if not federation.study.train.validation_fraction:
        return {}
    if federation.study.privacy.secure_aggregation:
        summed = secure_personal(federation)
        return {"personal_sum": summed} if summed else {}
    sums = tuple(empty_sums())
    declared = (*sums, *(PERSONAL + key for key in sums), PERSONAL + "kept")
    found = {}
    arrivals = _ask(federation, federation.progress.round, final=True)
    for name, answer in _answers(arrivals, declared=declared):
        received = answer.receipt.entry() if answer.receipt else {}
        federation.received += outside_rounds(name, received, reason=answer.reason, final=True)
        if answer.status != "ok" or PERSONAL + "kept" not in answer.metrics:
            continue
        own = {key: answer.metrics.get(PERSONAL + key, 0.0) for key in sums}
        found[name] = {
            "kept": answer.metrics[PERSONAL + "kept"] == 1,
            "global": summarise(add([{key: answer.metrics[key] for key in sums}])),
            "personal": summarise(add([own])),
        }
    return {"personal": {name: found[name] for name in sorted(found)}}
