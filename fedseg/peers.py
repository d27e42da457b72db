"""How a server tells each site of a study what sites there are: their number, and a digest."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Peers"]


@dataclass(frozen=True, kw_only=True)
class Peers:
    """A study's sites, as the server tells each of them.

    Attributes:
        sites: How many there are.
        digest: SHA-256 over their names.
    """

    sites: int
    digest: str

    @classmethod
    def of(cls, names: Collection[str]) -> "Peers":
        """Tell of sites by their names."""
        text = json.dumps(sorted(names))
        return cls(sites=len(names), digest=hashlib.sha256(text.encode()).hexdigest())

    def entries(self) -> dict[str, str | int]:
        """Entries of a message's config."""
        return {"sites": self.sites, "peers": self.digest}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Peers | None":
        """Unpack; None where the config doesn't tell, or tells what can't be."""
        sites, digest = record.get("sites"), record.get("peers")
        if not isinstance(sites, int) or not 0 < sites < 10**6:
            return None
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            return None
        return cls(sites=sites, digest=digest)
