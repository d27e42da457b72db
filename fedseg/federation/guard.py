"""The update guard: which updates stay out of a round, and which sites in the rounds after it.

A bad update is left out and puts its site in quarantine. The site is still sent work, since only
its updates can show that it is well again: it is on parole. They stay out and say nothing about the
others until enough good ones came in a row. Of a site that opposed the others, good ones are those
that agree; where the others don't agree, an update shows nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fedseg.errors import Reason
from fedseg.federation.judging import Verdict, judge

__all__ = ["Decision", "Quarantine", "Standing", "decide", "probe", "site_of"]

_MOST_CREDIT = 6.0
"""Rounds of agreement that are remembered, and so outweigh as many of opposition."""

_STILL_AGREED = 0.5
"""Share of the best agreement so far at which the sites still agree."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the guard remembers of a site.

    Attributes:
        credit: Sum of its agreement with the others over the rounds.
        out: Good updates that still stay out; 0 where it isn't in quarantine.
        reason: Why they do.
    """

    credit: float = 0.0
    out: int = 0
    reason: Reason | None = None


@dataclass(frozen=True)
class Quarantine:
    """What the guard remembers, a part of the checkpoint.

    Attributes:
        standings: Of each site.
        agreed: Largest median of a round's cosines with the mean of the others.
    """

    standings: Mapping[str, Standing] = field(default_factory=dict)
    agreed: float = 0.0

    def of(self, site: str) -> Standing:
        """Standing of a site."""
        return self.standings.get(site, Standing())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        sites = {site: asdict(self.standings[site]) for site in sorted(self.standings)}
        return {"sites": sites, "agreed": self.agreed}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Quarantine":
        """Read what `to_json` made; `{}` is the state before the first round."""
        standings = {
            site: Standing(
                credit=float(entry["credit"]),
                out=int(entry["out"]),
                reason=Reason(entry["reason"]) if entry["reason"] else None,
            )
            for site, entry in values.get("sites", {}).items()
        }
        return cls(standings, float(values.get("agreed", 0.0)))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a round's updates.

    Attributes:
        left_out: Updates that aren't averaged, and why.
        verdicts: On every update.
        quarantine: State for the next round.
    """

    left_out: Mapping[str, Reason]
    verdicts: Mapping[str, Verdict]
    quarantine: Quarantine


def decide(
    products: torch.Tensor,
    names: Sequence[str],
    quarantine: Quarantine,
    *,
    norm_factor: float,
    opposition: float,
    parole: int,
    found: Mapping[str, Reason] | None = None,
) -> Decision:
    """Judge a round's updates and say who is left out, now and in the next rounds.

    Args:
        products: Inner products of the updates, float64 `[S, S]`; see `gram`.
        names: Name of each update: its site, or `site@age` of one that came late.
        quarantine: State after the round before.
        norm_factor: Most times the median norm that an update may have.
        opposition: Rounds of opposition, less those of agreement, at which a site is out; 0: never.
        parole: Good updates in a row that stay out after a bad one.
        found: What is known to be bad already, by update; also of updates that can't be read and
            aren't in `products`.
    """
    found = found or {}
    before = {name: quarantine.of(site_of(name)) for name in (*names, *found)}
    verdicts = judge(
        products,
        names,
        norm_factor=norm_factor,
        opposition=opposition,
        agreed=_STILL_AGREED * quarantine.agreed,
        credit={name: standing.credit for name, standing in before.items()},
        suspects={name for name, standing in before.items() if standing.out},
        found=found,
    )
    standings = dict(quarantine.standings)
    bad = {**{name: v.reason for name, v in verdicts.items()}, **found}
    for site in {site_of(name) for name in before}:
        own = sorted(name for name in before if site_of(name) == site)
        reason = next((bad[name] for name in own if bad[name]), None)
        agreement = min(verdicts[name].agreement if name in verdicts else 0.0 for name in own)
        old = quarantine.of(site)
        credit = min(max(old.credit + agreement, -opposition), _MOST_CREDIT)
        good = agreement > 0 or old.reason != Reason.UPDATE_DIRECTION
        standings[site] = _next(old, reason, credit=credit, parole=parole, good=good)
    out = {name: bad[name] or before[name].reason for name in sorted(names)}
    left_out = {name: reason for name, reason in out.items() if reason is not None}
    kept = [verdict for name, verdict in verdicts.items() if name not in left_out]
    state = Quarantine(standings, max(quarantine.agreed, _median_cosine(kept)))
    return Decision(left_out=left_out, verdicts=verdicts, quarantine=state)


def _median_cosine(verdicts: Iterable[Verdict]) -> float:
    cosines = [verdict.cosine for verdict in verdicts if verdict.cosine is not None]
    return float(np.median(cosines)) if cosines else 0.0


def site_of(name: str) -> str:
    """Site of an update: `aachen@2` is one of `aachen` that came two rounds late."""
    return name.partition("@")[0]


def _next(
    old: Standing, reason: Reason | None, *, credit: float, parole: int, good: bool
) -> Standing:
    if reason is not None:
        return Standing(credit=credit, out=parole, reason=reason)
    left = old.out - good
    if left > 0:
        return Standing(credit=credit, out=left, reason=old.reason)
    # Who comes back starts anew, else its first small difference would put it out again.
    return Standing(credit=max(credit, 0.0) if old.out else credit)


def probe(
    names: Iterable[str], loss: Callable[[str | None], float], *, most: float
) -> dict[str, Reason]:
    """Try each update alone on the server's cases.

    Args:
        names: Names of the updates.
        loss: Loss of the global model moved by one update, of the global model itself for None.
        most: Share by which an update may raise the loss.

    Returns:
        The reason for each update that raises it by more, or to no number at all; see `decide`.
    """
    allowed = loss(None) * (1 + most)
    return {name: Reason.UPDATE_PROBE for name in sorted(names) if not loss(name) <= allowed}
