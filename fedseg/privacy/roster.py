"""A round of secure aggregation as everybody in it sees it: its terms, who takes part, who masks.

Sites and server each work it out from the same list of public keys. Its digest goes into every key
and signature, so two that were shown different lists, or have other terms, can't take part in one
sum.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedseg.errors import ProtocolError, TooFewSites
from fedseg.privacy.fixed_point import Encoding
from fedseg.privacy.graph import (
    LEAST_SITES,
    MOST_SITES,
    holder_threshold,
    neighbours,
    threshold,
)
from fedseg.privacy.secagg_keys import is_signed
from fedseg.privacy.secagg_wire import Advert, Purpose

__all__ = [
    "CONFIRM",
    "KEYS",
    "Party",
    "Terms",
    "advert_parts",
    "check_enough",
    "check_pinned",
    "check_survivors",
    "party_of",
    "signed_list",
]

KEYS, CONFIRM = "keys", "survivors"
"""Labels of what is signed."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a round's sites and server must agree on beforehand.

    Attributes:
        run: Id of the study run.
        round: The round, from 1.
        purpose: What the words are for.
        share: More than this share of the sites must be left; 0.5 to 1.
        clip: Values are clipped to [-clip, clip].
        max_weight: Largest weight of a site.
    """

    run: str
    round: int
    purpose: Purpose = "train"
    share: float
    clip: float
    max_weight: float

    def __post_init__(self) -> None:
        """Refuse thresholds with which two disjoint groups of sites could each unmask."""
        if not 0.5 <= self.share < 1:
            raise ProtocolError(f"threshold: got {self.share:g}; expected 0.5 to 1")

    @property
    def stamp(self) -> dict[str, Any]:
        """What each message says of the terms."""
        return {"run": self.run, "round": self.round, "purpose": self.purpose}


@dataclass(frozen=True, kw_only=True)
class Party:
    """A round's sites by index, 0 to n - 1.

    Attributes:
        terms: The terms.
        adverts: Each site's public keys.
        digest: Of terms and keys.
        signed: Whether every site signed its keys.
        neighbours: With whom each site masks.
    """

    terms: Terms
    adverts: tuple[Advert, ...]
    digest: bytes
    signed: bool
    neighbours: Sequence[tuple[int, ...]]

    @property
    def size(self) -> int:
        """n: number of sites."""
        return len(self.adverts)

    @property
    def threshold(self) -> int:
        """Fewest sites whose words the sum may have: of two, each knows the other's from it."""
        return max(LEAST_SITES, threshold(self.size, self.terms.share))

    @property
    def encoding(self) -> Encoding:
        """How updates become words."""
        return Encoding(sites=self.size, clip=self.terms.clip, max_weight=self.terms.max_weight)

    def holders(self, index: int) -> tuple[int, ...]:
        """Who holds a site's shares: itself and its neighbours, in rising order."""
        return tuple(sorted((index, *self.neighbours[index])))

    def needed(self, index: int) -> int:
        """Shares that restore a site's secrets."""
        return holder_threshold(len(self.holders(index)), self.size, self.terms.share)


def party_of(adverts: Sequence[Advert], terms: Terms) -> Party:
    """Work out a round from its public keys.

    Raises:
        TooFewSites: Fewer than three.
        ProtocolError: Two sites have one key, or one has a key twice.
    """
    if len(adverts) < LEAST_SITES:
        raise TooFewSites(
            f"secure aggregation: got {len(adverts)} sites; expected at least {LEAST_SITES}"
        )
    keys = {key for advert in adverts for key in (advert.channel, advert.mask)}
    if len(keys) < 2 * len(adverts) or len(adverts) > MOST_SITES:
        raise ProtocolError("roster: got a public key twice, or too many; expected one a site")
    digest = _digest(adverts, terms)
    signed = all(advert.signature is not None for advert in adverts)
    return Party(
        terms=terms,
        adverts=tuple(adverts),
        digest=digest,
        signed=signed,
        # Who may try out rosters may choose a site's neighbours; with signed keys, meant for
        # servers that aren't trusted, all mask with all.
        neighbours=neighbours(len(adverts), digest, complete=signed),
    )


def _digest(adverts: Sequence[Advert], terms: Terms) -> bytes:
    bounds = [terms.share.hex(), terms.clip.hex(), terms.max_weight.hex()]
    stated = [terms.run, terms.round, terms.purpose, *bounds]
    listed = [advert.model_dump_json() for advert in adverts]
    return hashlib.sha256(json.dumps([stated, listed]).encode()).digest()


def advert_parts(advert: Advert, terms: Terms) -> tuple[bytes, ...]:
    """What a site signs of its public keys."""
    number = terms.round.to_bytes(4, "big")
    keys = (advert.channel, advert.mask, advert.commitment)
    stated = (terms.run.encode(), number, terms.purpose.encode())
    return (*stated, advert.name.encode(), *keys)


def check_pinned(party: Party, own: int, pinned: Mapping[str, Ed25519PublicKey]) -> None:
    """Check at a site with pinned keys that every other site is one of them.

    Raises:
        ProtocolError: One isn't pinned, has another's name, or its signature isn't its own.
    """
    names = [advert.name for advert in party.adverts]
    if len(set(names)) < len(names):
        raise ProtocolError("roster: got two sites of one name; expected each peer once")
    for index, advert in enumerate(party.adverts):
        if index == own:
            continue
        key, signature = pinned.get(advert.name), advert.signature
        if key is None:
            raise ProtocolError(f"roster: got '{advert.name}'; expected only pinned peers")
        parts = advert_parts(advert, party.terms)
        if signature is None or not is_signed(key, signature, KEYS, *parts):
            raise ProtocolError(f"roster: got keys that '{advert.name}' didn't sign")


def check_survivors(party: Party, survivors: Sequence[int]) -> None:
    """Check a list of survivors.

    Raises:
        TooFewSites: It is below the threshold.
        ProtocolError: It isn't in rising order, or names a site that isn't there.
    """
    if list(survivors) != sorted(set(survivors)) or any(i >= party.size for i in survivors):
        raise ProtocolError("survivors: got a list out of order; expected each site once")
    check_enough(party, len(survivors), "are left")


def check_enough(party: Party, count: int, have: str) -> None:
    """Check how many sites have got so far.

    Args:
        party: The round.
        count: Number of sites.
        have: What they have done, for the error.

    Raises:
        TooFewSites: They are below the threshold.
    """
    if count < party.threshold:
        raise TooFewSites(
            f"secure aggregation: {count} of {party.size} sites {have}; expected at least "
            f"{party.threshold} (privacy.secagg-threshold, and {LEAST_SITES})"
        )


def signed_list(party: Party, survivors: Sequence[int]) -> tuple[bytes, ...]:
    """What a site signs when it confirms the survivors."""
    return (party.digest, b"".join(index.to_bytes(4, "big") for index in survivors))
