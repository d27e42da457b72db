"""Tests of fingerprints with epsilon: what a case can change, that it is hidden, what is left."""

import json
import logging
import math
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedseg.config import StudyConfig
from fedseg.data.fingerprint import (
    EDGES,
    CaseMeasure,
    Fingerprint,
    bin_of,
    fingerprint_of,
    quantile,
)
from fedseg.data.fingerprint_noise import _laplace, noised_fingerprint, parts_of
from fedseg.data.measure import site_fingerprint
from fedseg.data.node import open_site
from fedseg.data.planning import make_plan
from fedseg.data.site_secret import site_secret
from fedseg.errors import LedgerError, SiteError

SECRET = bytes(32)


def case(seed: int, *, lesions: int = 1) -> CaseMeasure:
    """A CT case of a plausible adult."""
    rng = np.random.default_rng(seed)
    found: CaseMeasure = {"lesion.ml": {7: float(lesions)}}
    values = {f"spacing.{axis}": mm for axis, mm in zip("xyz", (0.8, 0.8, 2.5), strict=True)}
    sizes = zip("xyz", (350, 250, 420), strict=True)
    values |= {f"extent.{axis}": rng.normal(mm, 20) for axis, mm in sizes}
    for name, value in values.items():
        found[name] = {int(bin_of(name, np.array([value]))[0]): 1.0}
    for name, middle in (("body.hu", 20), ("liver.hu", 105), ("tumor.hu", 60)):
        counts = np.bincount(bin_of(name, rng.normal(middle, 20, 500)))
        found[name] = {int(i): float(counts[i]) / 500 for i in np.flatnonzero(counts)}
    return found


def noised(
    cases: Sequence[CaseMeasure], *, secret: bytes = SECRET, epsilon: float = 1.0, **more: Any
) -> Fingerprint:
    given: dict[str, Any] = {"modalities": ["ct"] * len(cases), "min_count": 1, **more}
    return noised_fingerprint(cases, epsilon=epsilon, secret=secret, **given)


CASES = [case(seed) for seed in range(30)]


@given(
    seeds=st.lists(st.integers(0, 99), max_size=8),
    added=st.integers(100, 199),
    lesions=st.integers(1, 1000),
    kind=st.sampled_from(["ct", "mr"]),
)
def test_one_case_changes_each_of_eight_parts_by_one_at_most(
    seeds: list[int], added: int, lesions: int, kind: str
) -> None:
    cases = [case(seed) for seed in seeds]
    kinds: list[Any] = ["ct"] * len(cases)
    before = parts_of(cases, kinds)
    after = parts_of([*cases, case(added, lesions=lesions)], [*kinds, kind])
    assert len(before) == 8
    for name, values in after.items():
        assert np.abs(values - before[name]).sum() <= 1 + 1e-9


def test_noise_is_laplace_and_parts_do_not_share_it() -> None:
    drawn = _laplace(b"k" * 32, "spacing.x", 20_000)
    assert stats.kstest(drawn, stats.laplace.cdf).pvalue > 0.01
    assert abs(np.corrcoef(drawn, _laplace(b"k" * 32, "spacing.y", 20_000))[0, 1]) < 0.03


@pytest.mark.parametrize("epsilon", [8.0, 40.0])
def test_each_part_has_an_eighth_of_epsilon(epsilon: float) -> None:
    """All cases have one spacing, so one group of it is told."""
    off = [
        abs(sum(noised(CASES, epsilon=epsilon, secret=bytes([n] * 32)).histograms[name].mass) - 30)
        for n in range(100)
        for name in ("spacing.x", "spacing.z")
    ]
    assert np.median(off) == pytest.approx(8 / epsilon * math.log(2), rel=0.25)


def test_no_event_is_more_likely_than_epsilon_allows_with_one_case_more() -> None:
    """Audit: over many secrets, what a reader of the bytes sees with and without a case."""
    draws, epsilon = 1500, 2.0
    few = CASES[:6]
    seen = [
        Counter(
            event
            for draw in range(draws)
            for event in events(noised(cases, secret=draw.to_bytes(32, "big"), epsilon=epsilon))
        )
        for cases in (few, [*few, case(77, lesions=500)])
    ]
    assert len(seen[0] | seen[1]) > 20
    for event in seen[0] | seen[1]:
        one, other = sorted(counts[event] / draws for counts in seen)
        assert other <= math.exp(epsilon) * one + 5 * math.sqrt(other / draws)


def events(found: Fingerprint) -> set[Any]:
    return {
        *(("count", name, found.histograms[name].count) for name in EDGES),
        *(("ct", found.ct), ("liver", found.liver), ("tumor", found.tumor)),
        *found.held_back,
    }


def test_what_no_plan_reads_and_exact_numbers_do_not_leave() -> None:
    found = noised(CASES, epsilon=1e6, min_count=5)
    assert (found.ct, found.mr, found.liver, found.tumor) == (30, 0, 0, 0)
    for name in ("body.hu", "tumor.hu", "lesion.ml"):
        assert not found.histograms[name].count and not found.histograms[name].mass
    assert set(found.held_back) == {"mr", "liver", "tumor", "body.hu", "tumor.hu", "lesion.ml"}
    starts = {histogram.groups for histogram in found.histograms.values() if histogram.count}
    assert starts == {
        tuple(range(0, len(EDGES[name]) - 1, 4)) for name in ("spacing.x", "extent.x", "liver.hu")
    }
    assert Fingerprint.from_json(found.to_json()) == found


def test_same_cases_in_any_order_give_the_same_bytes_and_others_draw_anew() -> None:
    once = noised(CASES, epsilon=20)
    assert noised(CASES[::-1], epsilon=20).to_json() == once.to_json()
    # What isn't noised may change without a new draw.
    assert noised([{**m, "lesion.ml": {3: 9.0}} for m in CASES], epsilon=20) == once
    assert noised(CASES, epsilon=20, secret=b"1" * 32) != once

    def noise(epsilon: float, cases: Sequence[CaseMeasure]) -> np.ndarray:
        """Of the liver's HU, in units of its scale, where it is told."""
        told = np.array(noised(cases, epsilon=epsilon).histograms["liver.hu"].mass)
        groups = np.add.reduceat(told, np.arange(0, len(told), 4))
        exact = parts_of(cases, ["ct"] * len(cases))["liver.hu"]
        return np.where(groups > 0, (groups - exact) * epsilon, np.nan)

    one, twice, other = noise(20, CASES), noise(40, CASES), noise(20, CASES[:-1])
    assert np.nanmax(np.abs(one - twice)) > 0.1
    assert np.nanmax(np.abs(one - other)) > 0.1


@pytest.mark.parametrize("epsilon", [1e-300, 1e-9, 0.1, 1.0])
def test_where_noise_outweighs_the_cases_it_is_held_back_and_the_plan_says_default(
    epsilon: float,
) -> None:
    found = [noised(CASES[:5], epsilon=epsilon, secret=bytes([n] * 32)) for n in range(20)]
    told = [h for one in found for h in one.histograms.values() if h.count]
    assert len(told) <= 6  # of 140; 1 in 100 by chance
    plan = make_plan(StudyConfig(), [one for one in found if len(one.held_back) == 14][:1])
    assert plan.reasons["spacing"].startswith("default")
    for one in found:
        make_plan(StudyConfig(), [one])


def test_with_enough_cases_the_plan_stays_near() -> None:
    """As docs/privacy.md says: 30 cases and epsilon 10."""
    exact = fingerprint_of(CASES, modalities=["ct"] * 30, min_count=1)
    near = 0
    for draw in range(20):
        found = noised(CASES, epsilon=10, min_count=5, secret=bytes([draw] * 32))
        assert abs(found.ct - 30) < 8
        near += all(
            quantile(name, found.histograms[name], 0.5)
            == pytest.approx(quantile(name, exact.histograms[name], 0.5), rel=0.1)
            for name in ("spacing.x", "spacing.y", "spacing.z", "extent.x", "extent.z")
        )
        ends = [quantile("liver.hu", found.histograms["liver.hu"], q) for q in (0.005, 0.995)]
        assert ends == pytest.approx([50, 160], abs=40)
    assert near >= 17


NOISY = {"policy.fingerprint-epsilon": 1e4, "policy.min-count": 1}


def test_a_site_sends_the_same_noised_bytes_again(
    make_site: Callable[..., Path], tmp_path: Path
) -> None:
    node = {"data-dir": str(make_site("aachen")), "cache-dir": str(tmp_path / "cache"), **NOISY}
    site = open_site(node, StudyConfig())
    sent = site_fingerprint(site).to_json()
    assert site_fingerprint(site).to_json() == sent
    key = tmp_path / "cache" / "ledger.key"
    assert len(key.read_bytes()) == 32
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.unlink()
    assert site_fingerprint(site).to_json() != sent
    for part in ("images", "masks"):
        (Path(node["data-dir"]) / part / "case-0.nii.gz").unlink()
    fewer = json.loads(site_fingerprint(open_site(node, StudyConfig())).to_json())
    assert fewer["ct"] == 2


def test_noise_decides_whether_a_fingerprint_leaves_and_scans_are_not_told(
    make_site: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = {
        **{"data-dir": str(make_site("aachen")), "cache-dir": str(tmp_path / "cache"), **NOISY},
        "study-key": "k" * 16,
    }
    with caplog.at_level(logging.WARNING, "fedseg"):
        assert site_fingerprint(open_site(node, StudyConfig())).digests == ()
    assert "no digests of scans leave" in caplog.text
    # Three cases drown in the noise of epsilon 0.01, of this secret, too.
    (tmp_path / "cache" / "ledger.key").write_bytes(SECRET)
    node |= {"policy.fingerprint-min-cases": 2, "policy.fingerprint-epsilon": 0.01}
    with pytest.raises(SiteError, match="fewer than policy"):
        site_fingerprint(open_site(node, StudyConfig()))


def test_a_damaged_secret_is_an_error(tmp_path: Path) -> None:
    ledger = tmp_path / "site" / "ledger.jsonl"
    secret = site_secret(ledger)
    assert site_secret(ledger) == secret
    ledger.with_suffix(".key").write_bytes(b"")
    with pytest.raises(LedgerError, match=r"ledger.key: got 0 bytes; expected 32; "):
        site_secret(ledger)
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="can't be used"):
        site_secret(tmp_path / "file" / "ledger.jsonl")
