"""The one way out of a site: judged by its policy, written into its ledger, then handed to Flower.

Whatever goes wrong becomes a reason code; the story stays in the site's own log. What can't be
judged or written down doesn't leave: the server then gets a refusal, and where not even that can be
written, one fixed answer that says so.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Context, Message, MetricRecord

from fedseg.arrays import array_bytes
from fedseg.config import StudyConfig
from fedseg.data.node import own_config, own_name
from fedseg.data.plan import Plan
from fedseg.errors import (
    ConfigError,
    FedSegError,
    LedgerError,
    ModelError,
    ProtocolError,
    Reason,
    SiteError,
    out_of_memory,
)
from fedseg.greeting import SITE, Greeting, greeting_message
from fedseg.logs import show_logs
from fedseg.messages import (
    CONFIG,
    FINGERPRINT,
    METRICS,
    STATUS,
    UPDATE,
    answer_message,
    protocol_data,
    stored_study,
)
from fedseg.peers import Peers
from fedseg.privacy.ledger import append
from fedseg.privacy.policy import Departure, Request, check_departure, check_request
from fedseg.receipts import describe, stamp
from fedseg.site_config import SiteConfig

__all__ = ["LEFT", "Reply", "Work", "answered"]

log = logging.getLogger("fedseg.site")

Found = TypeVar("Found")

LEFT = "left"
"""Kind of the ledger's lines about what left."""

_REASONS: dict[type[FedSegError], Reason] = {
    ConfigError: Reason.PLAN,
    ModelError: Reason.MODEL,
    ProtocolError: Reason.SECURE_AGGREGATION,
    LedgerError: Reason.LEDGER,
}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, and what the ledger says of it that its bytes don't show.

    Attributes:
        message: The answer.
        notes: Plain JSON: `norm` of the update as it leaves, `clip` and `noise` (standard
            deviation) applied to it, and what else is worth a note.
    """

    message: Message
    notes: Mapping[str, Any] = field(default_factory=dict)


Work = Callable[[Message, Context, StudyConfig], Message | Reply]


@dataclass(frozen=True, kw_only=True)
class _Owner:
    """Whose answer it is: its name and config."""

    name: str
    config: SiteConfig


def answered(work: Work) -> Callable[[Message, Context], Message]:
    """Make a handler of a function that does a message's work at a site."""

    @functools.wraps(work)
    def handler(message: Message, context: Context) -> Message:
        show_logs()
        study = _attempt(lambda: _study(message, context))
        known = study if isinstance(study, StudyConfig) else None
        owner = _attempt(lambda: _owner(context, known))
        if isinstance(owner, Reason):  # the default ledger is all that is left
            unknown = _Owner(name="", config=SiteConfig())
            return _leave(message, context, unknown, Reply(message=_no(message, context, owner)))
        if isinstance(study, Reason):
            return _leave(message, context, owner, Reply(message=_no(message, context, study)))
        found = _attempt(lambda: _judged(work, message, context, owner, study))
        reply = Reply(message=_no(message, context, found)) if isinstance(found, Reason) else found
        return _leave(message, context, owner, reply)

    return handler


def _attempt(step: Callable[[], Found]) -> Found | Reason:
    """Do a step; what goes wrong is logged here and told by its reason alone."""
    try:
        return step()
    except SiteError as error:
        reason = error.reason
        log.error("%s: %s", reason.value, error)
    except FedSegError as error:
        found = (reason for kind, reason in _REASONS.items() if isinstance(error, kind))
        reason = next(found, Reason.DATA)
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
    return reason


def _study(message: Message, context: Context) -> StudyConfig:
    """Flower's run config; in a resumed run the config it began with, which the message carries."""
    stored = stored_study(message)
    try:
        if stored is not None:
            return StudyConfig.from_json(stored)
        return StudyConfig.from_run_config(context.run_config)
    except ConfigError as error:
        raise SiteError(Reason.CONFIG_MISMATCH, str(error)) from None


def _owner(context: Context, study: StudyConfig | None) -> _Owner:
    try:
        name, config = own_config(context.node_config, study)
    except ConfigError as error:
        raise SiteError(Reason.SITE_CONFIG, str(error)) from None
    return _Owner(name=name, config=config)


def _asked(message: Message) -> Mapping[str, Any]:
    """The message's config."""
    return message.content.config_records.get(CONFIG, ConfigRecord())


def _kind(message: Message) -> str:
    """hello, fingerprint, train, evaluate, or secagg for all its steps."""
    action = message.metadata.message_type.removeprefix("query.")
    return "secagg" if action.startswith("secagg_") else action


def _judged(
    work: Work, message: Message, context: Context, owner: _Owner, study: StudyConfig
) -> Reply:
    """Judge the request, do the work, judge what comes of it."""
    policy, asked = owner.config.policy, _asked(message)
    peers, plan = Peers.from_record(asked), asked.get("plan")
    request = Request(
        kind=_kind(message),
        study=study,
        model=Plan.from_json(plan).model if isinstance(plan, str) else None,
        peers=peers.sites - 1 if peers else None,
    )
    check_request(policy, request)
    found = work(message, context, study)
    reply = found if isinstance(found, Reply) else Reply(message=found)
    check_departure(policy, _departure(request, reply))
    return reply


def _departure(request: Request, reply: Reply) -> Departure:
    content, notes = reply.message.content, reply.notes
    arrays = content.array_records.get(UPDATE)
    text = str(content.config_records.get(FINGERPRINT, ConfigRecord()).get("json", ""))
    sizes = (
        array_bytes(arrays) if arrays is not None else 0,
        len(text.encode()),
        len(protocol_data(reply.message) or b""),
    )
    metrics = content.metric_records.get(METRICS, MetricRecord())
    return Departure(
        kind=request.kind,
        study=request.study,
        size=sum(sizes),
        metrics={name: float(str(value)) for name, value in metrics.items()},
        fingerprint=FINGERPRINT in content,
        norm=notes.get("norm"),
        noise=notes.get("noise") or 0.0,
    )


def _no(message: Message, context: Context, reason: Reason) -> Message:
    """An answer without anything but its reason."""
    if _kind(message) == "hello":
        return greeting_message(message, _apology(context, reason))
    status = "refused" if reason.refused else "failed"
    return answer_message(message, status=status, reason=reason)


def _apology(context: Context, reason: Reason) -> Greeting:
    """Say hello all the same, so that people see which site can't take part."""
    node = context.node_config
    simulated = "data-dir" not in node and "num-partitions" in node
    try:
        sites = int(node["num-partitions"]) if simulated else 0
    except (ValueError, OverflowError):
        sites = 0
    return Greeting(name=own_name(node), simulated=simulated, sites=sites, reason=reason)


def _leave(message: Message, context: Context, owner: _Owner, reply: Reply) -> Message:
    """Write an answer into the ledger and hand it out, or else the one that can't be written."""
    try:
        entry = _entry(message, context, owner, reply)
        line = append(owner.config.ledger_file, entry)
        return stamp(reply.message, line["hash"])
    except Exception as error:
        if isinstance(error, LedgerError):
            log.error("%s", error)
        else:
            log.exception("the ledger's line failed")
        return _no(message, context, Reason.LEDGER)


def _entry(message: Message, context: Context, owner: _Owner, reply: Reply) -> dict[str, Any]:
    """What the ledger says about an answer."""
    asked, content = _asked(message), reply.message.content
    peers = Peers.from_record(asked)
    state: Mapping[str, Any] = next(
        (content.config_records[name] for name in (STATUS, SITE) if name in content), {}
    )
    told = {
        "run": _bounded(asked.get("study-run")),
        "round": _bounded(asked.get("server-round")),
        "final": asked.get("final") is True or None,
        "peers": {"sites": peers.sites, "sha256": peers.digest} if peers else None,
    }
    return {
        "kind": LEFT,
        "message": message.metadata.message_type.removeprefix("query."),
        "site": owner.name,
        **{key: value for key, value in told.items() if value is not None},
        "flower_run": context.run_id,
        "status": state.get("status") or ("failed" if state.get("reason") else "ok"),
        "reason": state.get("reason") or None,
        **describe(content),
        **reply.notes,
    }


def _bounded(value: Any) -> str | int | None:
    """What the server says goes into the ledger only if it is short."""
    if isinstance(value, str):
        return value[:64]
    return value if isinstance(value, int) else None
