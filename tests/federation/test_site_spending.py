"""A site counts what its data spends over all studies, and stops where its policy says."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from test_central_dp import history
from test_local_and_record_dp import LOCAL, RECORD

from fedseg import site_work
from fedseg.errors import REASONS, Reason
from fedseg.federation.site_spending import SPENT
from fedseg.privacy.accountant import Mechanism, epsilon_of
from fedseg.privacy.ledger import read

Run = Callable[..., Any]
ONE = {"federation.rounds": 1, "federation.sites": "2"}
HALF = Mechanism(noise_multiplier=0.5)


@pytest.fixture
def sites(make_site: Callable[..., Path], tmp_path: Path) -> dict[int, dict[str, Any]]:
    return {
        n + 1: {
            "data-dir": str(make_site(name, cases=3, seed=n)),
            "device": "cpu",
            "cache-dir": str(tmp_path / f"cache-{name}"),
        }
        for n, name in enumerate(("aachen", "bonn"))
    }


def spent(site: dict[str, Any]) -> list[dict[str, Any]]:
    lines = read(Path(site["cache-dir"]) / "ledger.jsonl")
    return [line for line in lines if line["kind"] == SPENT]


def test_each_release_is_in_the_ledger_before_it_leaves(run_study: Run, sites: Any) -> None:
    folder, _ = run_study(sites, {**LOCAL, "federation.sites": "2"})
    for site in sites.values():
        lines = spent(site)
        assert [(line["round"], line["run"]) for line in lines] == [
            (1, folder.run_id),
            (2, folder.run_id),
        ]
        expected = [epsilon_of([(HALF, n)], delta=1e-5) for n in (1, 2)]
        assert [line["epsilon"] for line in lines] == expected
        # The server comes to the same sum.
        assert history(folder)[2]["privacy"]["epsilon"] == expected[1]
        kinds = [line["kind"] for line in read(Path(site["cache-dir"]) / "ledger.jsonl")]
        assert kinds.index(SPENT) < len(kinds) - 1
        left = [
            line
            for line in read(Path(site["cache-dir"]) / "ledger.jsonl")
            if line.get("message") == "train"
        ]
        assert [(line["clip"], line["noise"]) for line in left] == [(0.05, 0.05)] * 2


def test_it_adds_up_over_studies_and_modes(run_study: Run, sites: Any) -> None:
    run_study(sites, {**LOCAL, **ONE})
    run_study(sites, {**RECORD, **ONE, "train.steps-per-epoch": 3})
    run_study(sites, {**LOCAL, **ONE, "privacy.noise-multiplier": 2.0})
    line = spent(sites[1])[-1]
    record = Mechanism(noise_multiplier=1.0, rate=0.5, steps=3)
    all_of_it = [(HALF, 1), (record, 1), (Mechanism(noise_multiplier=1.0), 1)]
    assert line["epsilon"] == pytest.approx(epsilon_of(all_of_it, delta=1e-5))


def test_past_its_policy_a_site_refuses_whatever_the_run(run_study: Run, sites: Any) -> None:
    limit = epsilon_of([(HALF, 2)], delta=1e-5)
    sites[2]["policy.max-epsilon"] = limit
    config = {**LOCAL, "federation.sites": "2", "federation.min-sites": 1}
    folder, _ = run_study(sites, {**config, "federation.rounds": 3})
    told = [
        (line["sites"]["bonn"]["status"], line["sites"]["bonn"]["reason"])
        for line in history(folder)[1:]
    ]
    assert told == [("ok", None), ("ok", None), ("refused", "policy-max-epsilon")]
    # A study of its own, with a delta that makes epsilon look small, gets no more.
    again, _ = run_study(sites, {**config, **ONE, "privacy.delta": 0.5})
    assert history(again)[1]["sites"]["bonn"]["reason"] == "policy-max-epsilon"
    assert len(spent(sites[2])) == 2


def test_data_that_moved_or_grew_is_still_the_same_data(
    run_study: Run, sites: Any, tmp_path: Path
) -> None:
    run_study(sites, {**LOCAL, **ONE})
    folder = Path(sites[1]["data-dir"])
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    for part in ("images", "masks"):
        (moved / part / "case-0.nii.gz").rename(moved / part / "renamed.nii.gz")
        (moved / part / "case-1.nii.gz").unlink()
    sites[1]["data-dir"] = str(moved)
    run_study(sites, {**LOCAL, **ONE})
    assert spent(sites[1])[-1]["epsilon"] == epsilon_of([(HALF, 2)], delta=1e-5)
    # Other cases have spent nothing yet.
    other = {1: {**sites[1], "data-dir": sites[2]["data-dir"]}, 2: sites[2]}
    other[2] = {**sites[2], "name": "chemnitz", "data-dir": str(moved)}
    run_study(other, {**LOCAL, **ONE})
    assert spent(sites[1])[-1]["epsilon"] == epsilon_of([(HALF, 1)], delta=1e-5)


def test_cases_are_marked_under_a_key_that_is_not_in_the_ledger(run_study: Run, sites: Any) -> None:
    both = dict(sites)
    both[2] = {**sites[2], "data-dir": sites[1]["data-dir"], "name": "bonn"}
    run_study(both, {**LOCAL, **ONE})
    one, other = spent(sites[1])[0], spent(sites[2])[0]
    assert len(one["cases"]) == len(other["cases"]) == 3
    assert not set(one["cases"]) & set(other["cases"])
    key = Path(sites[1]["cache-dir"]) / "ledger.key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    # Without its key nobody knows whose an earlier line was: it counts.
    key.unlink()
    run_study(both, {**LOCAL, **ONE})
    assert spent(sites[1])[-1]["epsilon"] == epsilon_of([(HALF, 2)], delta=1e-5)


def test_a_ledger_that_was_edited_stops_the_site(run_study: Run, sites: Any) -> None:
    run_study(sites, {**LOCAL, **ONE})
    ledger = Path(sites[2]["cache-dir"]) / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join(line for line in lines if SPENT not in json.loads(line).values()))
    folder, _ = run_study(sites, {**LOCAL, **ONE, "federation.min-sites": 1})
    assert history(folder)[1]["sites"]["bonn"]["status"] == "failed"
    assert history(folder)[1]["sites"]["bonn"]["reason"] == "ledger"


def test_without_the_accountant_a_site_says_so_before_it_trains(
    run_study: Run, sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def missing(message: Message) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "dp_accounting", None)
            patch.setattr(site_work, "train_at_site", lambda *_: pytest.fail("it trained"))
            yield

    config = {**LOCAL, **ONE, "federation.min-sites": 1}
    folder, _ = run_study(sites, config, around={2: missing})
    site = history(folder)[1]["sites"]["bonn"]
    assert (site["status"], site["reason"]) == ("failed", "accountant-missing")
    assert "pip install 'fedseg[dp]'" in REASONS[Reason(site["reason"])]
    assert spent(sites[2]) == []


def test_with_central_noise_a_site_has_nothing_of_its_own_to_count(
    run_study: Run, sites: Any
) -> None:
    central = {**LOCAL, "privacy.mode": "central-dp", "federation.weighting": "equal"}
    run_study(sites, {**central, **ONE})
    assert spent(sites[1]) == []
