"""Secure aggregation under Flower's own engines: what a site keeps between messages stays there."""

from pathlib import Path

import pytest
from processes import SMALL, Run, Workplace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = ("site-0", "site-1", "site-2")
SECURE = {
    **SMALL,
    "federation.guard": False,
    "federation.sites": 3,
    "privacy.secure-aggregation": True,
}


def check(run: Run, *, rounds: int) -> None:
    assert run.status == "finished:completed"
    lines = run.history()
    assert [line["round"] for line in lines] == list(range(rounds + 1))
    for line in lines[1:]:
        assert "failed" not in line
        assert line["secagg"]["summed"] == 3
        assert {name: site["status"] for name, site in line["sites"].items()} == {
            name: "ok" for name in SITES
        }
        assert all(not site["training"] for site in line["sites"].values())


def test_simulation(workplace: Workplace) -> None:
    check(workplace.simulate(SECURE, sites=3), rounds=2)


def test_supernodes(workplace: Workplace, phantoms: Path) -> None:
    workplace.superlink()
    workplace.connection("insecure = true")
    for name in SITES:
        config = {
            "data-dir": str(phantoms / name),
            "cache-dir": str(workplace.root / f"cache-of-{name}"),
            "name": name,
            "device": "cpu",
            "threads": 1,
        }
        workplace.supernode(name, config)
    workplace.wait_online(3)
    # Each of a round's eight messages to a site has a process of its own.
    check(workplace.deploy({**SECURE, "federation.rounds": 1}, seconds=600), rounds=1)
