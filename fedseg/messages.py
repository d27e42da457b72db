"""The one place that knows record keys: what travels between server and site, packed and unpacked.

Server to site: `arrays` (the shared floats as one vector), `buffers` (integer state, where the
network has any), `config` (see `Task`; of a resumed run also the stored study config). Site to
server: `update` (change of the shared floats, encoded), `metrics` (numbers under declared keys),
`status` (ok, failed or refused, and a reason code), `fingerprint`. Both ways `secagg`: a message of
secure aggregation. Every answer also has `ledger`, see `receipts`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedseg.arrays import array_bytes, state_to_arrays
from fedseg.config import StudyConfig
from fedseg.errors import ConfigError, Reason
from fedseg.peers import Peers
from fedseg.receipts import Receipt, receipt_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "ARRAYS",
    "CONFIG",
    "FINGERPRINT",
    "LATE",
    "PERSONAL",
    "TRAIN_METRICS",
    "Answer",
    "Task",
    "answer_message",
    "flower_error",
    "protocol_data",
    "protocol_record",
    "query_content",
    "read_answer",
    "stored_study",
    "study_text",
]

ARRAYS, BUFFERS, CONFIG = "arrays", "buffers", "config"
UPDATE, METRICS, STATUS = "update", "metrics", "status"
FINGERPRINT, SECAGG = "fingerprint", "secagg"

TRAIN_METRICS = (
    *("cases", "voxels", "annotated", "skipped"),
    *("patches", "steps", "first_loss", "loss", "seconds"),
)
"""Numbers a site sends about training; about evaluation it sends `metrics.empty_sums`."""

PERSONAL = "personal."
"""Prefix of the same sums for the site's personal model, and of whether it was kept."""

_MAX_STUDY = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a train or evaluate message asks for, beside the weights.

    Attributes:
        study_run: Id of the study run.
        config_digest: Digest of the study config at the server.
        plan: The plan as JSON.
        round_number: This round, from 1.
        rounds: Rounds of the whole run.
        final: Whether training is over: the site then compares its personal model.
        peers: The study's sites, see `Peers`.
        study: Study config as JSON where it isn't Flower's run config: in a resumed run.
        proximal_mu: FedProx's mu; 0 elsewhere. Under Flower's own key.
    """

    study_run: str
    config_digest: str
    plan: str
    round_number: int
    rounds: int
    final: bool = False
    peers: Peers | None = None
    study: str = ""
    proximal_mu: float = 0.0

    def to_record(self) -> ConfigRecord:
        """Pack; `proximal-mu` and `server-round` are added by Flower's strategies."""
        return ConfigRecord(
            {
                "study-run": self.study_run,
                "config-digest": self.config_digest,
                "plan": self.plan,
                "server-round": self.round_number,
                "rounds": self.rounds,
                "final": self.final,
                **(self.peers.entries() if self.peers else {}),
                **({"study": self.study} if self.study else {}),
            }
        )

    @classmethod
    def from_message(cls, message: Message) -> Task:
        """Unpack.

        Raises:
            ConfigError: A key is missing or has another type.
        """
        record = message.content.config_records.get(CONFIG, ConfigRecord())
        texts = [record.get(key) for key in ("study-run", "config-digest", "plan")]
        numbers = [record.get(key) for key in ("server-round", "rounds")]
        mu = record.get("proximal-mu", 0.0)
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError("task: study-run, config-digest or plan is missing")
        if not all(type(n) is int and 0 <= n < 2**31 for n in numbers):  # True is none
            raise ConfigError("task: server-round or rounds is missing")
        if not re.fullmatch(r"\w[\w.-]{0,63}", str(texts[0])):  # it names folders of the site
            raise ConfigError("task: study-run has other characters than letters, digits, - and _")
        if not isinstance(mu, int | float) or not 0 <= mu < math.inf:
            raise ConfigError(f"task: got proximal-mu {mu!r}; expected a number of at least 0")
        return cls(
            study_run=str(texts[0]),
            config_digest=str(texts[1]),
            plan=str(texts[2]),
            round_number=int(str(numbers[0])),
            rounds=int(str(numbers[1])),
            final=record.get("final") is True,
            peers=Peers.from_record(record),
            proximal_mu=float(mu),
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for one site and task.

    Attributes:
        status: ok, late, failed, refused or quarantined.
        reason: Why not ok.
        detail: A Python package name where one is missing, else `""`.
        metrics: Numbers the site sent.
        update: Encoded change of the shared floats, None where there is none.
        bytes_up: Size of the arrays received.
        protocol: Message of secure aggregation, None where there is none.
        receipt: What came, to be held against the site's ledger; None where nothing did.
    """

    status: str
    reason: Reason | None = None
    detail: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    update: ArrayRecord | None = None
    bytes_up: int = 0
    protocol: bytes | None = None
    receipt: Receipt | None = None


LATE = Answer(status="late", reason=Reason.DEADLINE)
"""What came of a site that didn't answer in time."""


def stored_study(message: Message) -> str | None:
    """Study config (JSON) that a message of a resumed run carries, None elsewhere."""
    text = message.content.config_records.get(CONFIG, ConfigRecord()).get("study")
    return text if isinstance(text, str) and len(text) <= _MAX_STUDY else None


def query_content(study: StudyConfig, peers: Peers | None = None) -> RecordDict:
    """Content of hello and fingerprint: the sites, where they are known; a resumed run's config."""
    text = study_text(study)
    entries: dict[str, Any] = {
        **(peers.entries() if peers else {}),
        **({"study": text} if text else {}),
    }
    return RecordDict({CONFIG: ConfigRecord(entries)} if entries else {})


def study_text(study: StudyConfig) -> str:
    """Study config to send: Flower's run config reaches the sites anyway, unless it is resumed."""
    return study.model_dump_json(by_alias=True) if study.output.resume else ""


def answer_message(
    to: Message,
    *,
    status: str,
    reason: Reason | None = None,
    metrics: Mapping[str, float] | None = None,
    update: Mapping[str, torch.Tensor] | None = None,
    fingerprint: str | None = None,
    protocol: bytes | None = None,
) -> Message:
    """Pack a site's answer: numbers under declared keys, and no text but status and reason.

    A fingerprint is JSON of numbers, the very bytes that `fedseg fingerprint` prints.
    """
    content = RecordDict(
        {
            STATUS: ConfigRecord({"status": status, "reason": reason.value if reason else ""}),
            METRICS: MetricRecord({key: float(value) for key, value in (metrics or {}).items()}),
        }
    )
    if update is not None:
        content[UPDATE] = state_to_arrays(update)
    if fingerprint is not None:
        content[FINGERPRINT] = ConfigRecord({"json": fingerprint})
    if protocol is not None:
        content[SECAGG] = protocol_record(protocol)
    return Message(content, reply_to=to)


def read_answer(message: Message, *, declared: Collection[str]) -> Answer:
    """Unpack a site's answer; whatever is odd about it becomes a reason, never an exception.

    Args:
        message: The reply.
        declared: Keys the numbers may have.
    """
    if message.has_error():
        reason, detail = flower_error(message)
        return Answer(status="failed", reason=reason, detail=detail)
    return replace(_read_content(message, declared), receipt=receipt_of(message))


def _read_content(message: Message, declared: Collection[str]) -> Answer:
    content = message.content
    record = content.config_records.get(STATUS, ConfigRecord())
    status, code = record.get("status"), record.get("reason")
    if status not in ("ok", "failed", "refused"):
        return Answer(status="failed", reason=Reason.BAD_UPDATE)
    code_reason = Reason(code) if code in list(Reason) else None
    if status != "ok":
        return Answer(status=str(status), reason=code_reason or Reason.ERROR)
    metrics = _numbers(content.metric_records.get(METRICS, MetricRecord()), declared)
    if metrics is None:
        return Answer(status="failed", reason=Reason.BAD_UPDATE)
    update = content.array_records.get(UPDATE)
    size = array_bytes(update) if update is not None else 0
    protocol = protocol_data(message)
    return Answer(status="ok", metrics=metrics, update=update, bytes_up=size, protocol=protocol)


def protocol_record(data: bytes) -> ConfigRecord:
    """Pack a message of secure aggregation."""
    return ConfigRecord({"data": data})


def protocol_data(message: Message) -> bytes | None:
    """Unpack a message of secure aggregation, None where there is none."""
    data = message.content.config_records.get(SECAGG, ConfigRecord()).get("data")
    return data if isinstance(data, bytes) else None


def _numbers(record: MetricRecord, declared: Collection[str]) -> dict[str, float] | None:
    metrics = {}
    for key, value in record.items():
        if key not in declared or isinstance(value, list) or not math.isfinite(value):
            return None
        metrics[key] = float(value)
    return metrics


def flower_error(message: Message) -> tuple[Reason, str]:
    """Translate Flower's error reply; its text holds tracebacks with paths and is not passed on."""
    text = message.error.reason or ""
    missing = re.search(r"No module named '([A-Za-z_][\w.]{0,63})'", text)
    if missing:
        return Reason.MODEL_MISSING, missing.group(1)
    return _FLOWER_ERRORS.get(message.error.code, Reason.ERROR), ""


_FLOWER_ERRORS = {
    ErrorCode.MESSAGE_UNAVAILABLE: Reason.UNREACHABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: Reason.UNREACHABLE,
    ErrorCode.NODE_UNAVAILABLE: Reason.UNREACHABLE,
    ErrorCode.INVALID_FAB: Reason.UNSIGNED,
    ErrorCode.CLIENT_APP_CRASHED: Reason.CRASHED,
}
