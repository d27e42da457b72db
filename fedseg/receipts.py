"""What an answer is, in numbers both ends can work out: records, bytes, SHA-256.

A site writes this into its ledger and sends the hash of that line with the answer; the server keeps
what it works out itself beside that hash. `fedseg audit` holds the two against each other.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

__all__ = ["LEDGER", "Receipt", "content_digest", "describe", "receipt_of", "stamp"]

LEDGER = "ledger"
"""Record with the hash of the ledger's line: the one record which that line can't tell of."""

_HASH = "hash"
_SHORT = 64
"""Texts up to this length are written out in the ledger, longer ones as size and SHA-256."""

Record = ArrayRecord | ConfigRecord | MetricRecord


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What the server keeps about an answer.

    Attributes:
        kind: Type of the message.
        sha256: Of the records that came.
        ledger: Hash of the line that the site says it wrote, `""` where it says none.
    """

    kind: str
    sha256: str
    ledger: str

    def entry(self) -> dict[str, dict[str, str]]:
        """The receipt as `history.jsonl` has it, by kind."""
        return {self.kind: {"sha256": self.sha256, "ledger": self.ledger}}


def stamp(message: Message, line_hash: str) -> Message:
    """Add the hash of the ledger's line to an answer."""
    message.content[LEDGER] = ConfigRecord({_HASH: line_hash})
    return message


def receipt_of(message: Message) -> Receipt:
    """Work out the receipt for an answer that came."""
    found = message.content.config_records.get(LEDGER, ConfigRecord()).get(_HASH)
    known = isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found)
    return Receipt(
        kind=message.metadata.message_type.removeprefix("query."),
        sha256=content_digest(message.content),
        ledger=str(found) if known else "",
    )


def content_digest(content: RecordDict) -> str:
    """SHA-256 over the digests of all records but the ledger's own, in order of their names."""
    return _joint({name: _digest(record) for name, record in content.items() if name != LEDGER})


def _joint(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _digest(record: Record) -> str:
    """SHA-256 over each entry's name, kind and length, and its bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(record.items()):
        if isinstance(value, Array):
            data = value.data
            head = [name, "array", value.dtype, list(value.shape), value.stype, len(data)]
        else:
            data = value if isinstance(value, bytes) else repr(value).encode()
            head = [name, type(value).__name__, len(data)]
        digest.update(json.dumps(head).encode())
        digest.update(data)
    return digest.hexdigest()


def describe(content: RecordDict) -> dict[str, Any]:
    """Tell what an answer has, as plain JSON: no array's values, but every number and short text.

    Returns:
        `records` by name, `bytes` of arrays and of long texts, and the `sha256` of all.
    """
    records = {name: _described(record) for name, record in content.items() if name != LEDGER}
    size = sum(record["bytes"] for record in records.values())
    digest = _joint({name: record["sha256"] for name, record in records.items()})
    return {"records": records, "bytes": size, "sha256": digest}


def _described(record: Record) -> dict[str, Any]:
    digest = _digest(record)
    if isinstance(record, ArrayRecord):
        arrays = [[name, a.dtype, list(a.shape), len(a.data)] for name, a in record.items()]
        return {"arrays": arrays, "bytes": sum(row[3] for row in arrays), "sha256": digest}
    values = {name: _shown(value) for name, value in record.items()}
    size = sum(value["bytes"] for value in values.values() if isinstance(value, Mapping))
    return {"values": values, "bytes": size, "sha256": digest}


def _shown(value: Any) -> Any:
    """A number or short text as it is; for anything longer its size and the SHA-256 of its bytes.

    A fingerprint's SHA-256 is that of what `fedseg fingerprint` prints, without the end of line.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _SHORT):
        return value
    data = value if isinstance(value, bytes) else str(value).encode()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
