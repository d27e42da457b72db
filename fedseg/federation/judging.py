"""Judge a round's updates by their inner products: who sends nothing, far too much, the opposite?

An update is judged by its norm against the median norm, then by its direction: its cosine with the
mean of the others, each of them cut to the median norm so that a huge one can't turn the mean (a
plain mean has no defence: Blanchard et al., NeurIPS 2017; cosines and cut norms: Cao et al.,
FLTrust, NDSS 2021).

No fixed cosine tells honest from hostile. Once the sites have learnt what they have in common, only
their differences are left, and these cancel out: an honest site then points away from the others
(on phantoms -.2 with AdamW, -.6 with SGD, in the last of 12 rounds). So a cosine counts by what the
others have among themselves, not at all where they agree less than half as well as they once did,
and adds up over the rounds to the site's credit: who learnt what others learnt may differ later.

Nobody can say which of two sites is wrong, and of three the other two are one opinion, which counts
half. At most a minority is left out for its direction in one round.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedseg.errors import Reason

__all__ = ["Verdict", "judge"]

FloatArray = npt.NDArray[np.float64]

_NOTHING = 1e-3
"""Share of the median norm below which an update is as good as zero: one step beside a thousand."""

_AGREED = 0.05
"""The others agree where the median of their cosines is at least this. The first round has .1."""

_OPPOSED = -0.25
"""Agreement from which the update of a site that is out is still a bad one."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On one update of one round.

    Attributes:
        norm: Its norm, as a multiple of the median norm.
        cosine: With the mean of the others, None where it wasn't judged.
        agreement: The cosine by the median of the others' among themselves, -1 to 1; 0 where they
            don't agree.
        reason: Why it is left out, None if it isn't.
    """

    norm: float
    cosine: float | None = None
    agreement: float = 0.0
    reason: Reason | None = None


def judge(
    products: torch.Tensor,
    names: Sequence[str],
    *,
    norm_factor: float,
    opposition: float,
    agreed: float = 0.0,
    credit: Mapping[str, float] | None = None,
    suspects: Collection[str] = (),
    found: Mapping[str, Reason] | None = None,
) -> dict[str, Verdict]:
    """Judge each update; their order doesn't matter.

    Args:
        products: Inner products of the updates, float64 `[S, S]`; see `gram`.
        names: Their names.
        norm_factor: Most times the median norm that an update may have.
        opposition: An update is out where credit and agreement fall to this below 0; 0: never.
        agreed: Least median of the others' cosines at which they agree; .05 at least.
        credit: Agreement in the rounds before, by name.
        suspects: Updates that are judged against the others, but not among them.
        found: What is known to be bad already, by name.
    """
    order = sorted(range(len(names)), key=lambda i: names[i])
    names = [names[i] for i in order]
    inner: FloatArray = products.numpy()[np.ix_(order, order)]
    reasons = [(found or {}).get(name) for name in names]
    trusted = [name not in suspects for name in names]
    norms = _judge_norms(inner, reasons, trusted, norm_factor)
    evidence: dict[int, tuple[float, float]] = {}
    if opposition:
        credits = {
            i: (credit or {}).get(names[i], 0.0)
            for i, reason in enumerate(reasons)
            if reason is None and trusted[i]
        }
        agreed = max(agreed, _AGREED)
        kept, evidence = _judge_directions(inner, credits, opposition, agreed)
        for i in set(credits) - set(kept):
            reasons[i] = Reason.UPDATE_DIRECTION
        for i, reason in enumerate(reasons):
            if reason is None and not trusted[i] and len(kept) > 1:
                evidence[i] = _directions(inner, [*kept, i], agreed)[-1]
                if evidence[i][1] <= _OPPOSED:
                    reasons[i] = Reason.UPDATE_DIRECTION
    verdicts = {}
    for i, name in enumerate(names):
        cosine, agreement = evidence.get(i, (None, 0.0))
        verdicts[name] = Verdict(
            norm=norms[i], cosine=cosine, agreement=agreement, reason=reasons[i]
        )
    return verdicts


def _judge_norms(
    inner: FloatArray, reasons: list[Reason | None], trusted: Sequence[bool], factor: float
) -> list[float]:
    """Write down who sends nothing or too much; return norms as multiples of the median."""
    norms = np.sqrt(inner.diagonal())
    open_cases = np.array([reason is None for reason in reasons], dtype=bool)
    usual = norms[open_cases & np.array(trusted, dtype=bool) & (norms > 0)]
    median = float(np.median(usual)) if usual.size else 0.0
    for i, norm in enumerate(norms):
        if reasons[i] is not None:
            continue
        enough = usual.size > (2 if trusted[i] else 1)
        if norm == 0 or (enough and norm < _NOTHING * median):
            reasons[i] = Reason.ZERO_UPDATE
        elif enough and norm > factor * median:
            reasons[i] = Reason.UPDATE_NORM
    return [float(norm / median) if median else 0.0 for norm in norms]


def _judge_directions(
    inner: FloatArray, credit: Mapping[int, float], opposition: float, agreed: float
) -> tuple[list[int], dict[int, tuple[float, float]]]:
    """Leave out the worst, judge the others anew without it, and so on.

    Returns:
        Who is kept; cosine and agreement of each, kept or not.
    """
    kept = sorted(credit)
    evidence: dict[int, tuple[float, float]] = {}
    majority = len(kept) // 2 + 1
    while len(kept) > 2:
        evidence.update(zip(kept, _directions(inner, kept, agreed), strict=True))
        left = {i: (credit[i] + evidence[i][1], evidence[i][0], i) for i in kept}
        worst = min(kept, key=left.__getitem__)
        if left[worst][0] > -opposition or len(kept) == majority:
            break
        kept.remove(worst)
    return kept, evidence


def _directions(inner: FloatArray, kept: Sequence[int], agreed: float) -> list[tuple[float, float]]:
    """Cosine of each (three at least) with the mean of the others, and its agreement."""
    inner = inner[np.ix_(kept, kept)]
    norms = np.sqrt(inner.diagonal())
    cut = np.minimum(1, np.median(norms) / norms)
    inner = inner * np.outer(cut, cut)
    squares, sums, total = inner.diagonal(), inner.sum(1), inner.sum()
    cosines = _cosine(sums - squares, squares, total - 2 * sums + squares)
    # Row i: the same cosines of all others, as if i weren't there.
    rest = total - 2 * (sums[:, None] + sums - inner) + squares[:, None] + squares
    among = _cosine(sums - squares - inner, squares, rest)
    np.fill_diagonal(among, np.nan)
    usual = np.nanmedian(among, axis=1)
    weight = 1.0 if len(kept) > 3 else 0.5
    agreement = weight * np.clip(cosines / np.maximum(usual, agreed), -1, 1)
    agreement[usual < agreed] = 0
    return [(float(c), float(a)) for c, a in zip(cosines, agreement, strict=True)]


def _cosine(product: FloatArray, square: FloatArray, other: FloatArray) -> FloatArray:
    """Cosines from inner products and squared norms; 0 where a norm is 0."""
    scale = np.sqrt(np.maximum(square * other, 0))
    cosine: FloatArray = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    return cosine
