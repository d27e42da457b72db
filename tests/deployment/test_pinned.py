"""Secure aggregation over SuperNodes whose peers' keys are pinned, made as docs/privacy.md says."""

from pathlib import Path

import pytest
from processes import SMALL, Workplace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = ("site-0", "site-1", "site-2")
INVENTED = "site-3"
SECURE = {**SMALL, "federation.guard": False, "privacy.secure-aggregation": True}


def make_key(workplace: Workplace, name: str) -> str:
    """Make a site's signing key and return the line that its peers pin."""
    key = workplace.root / f"{name}.pem"
    workplace.call("openssl", "genpkey", "-algorithm", "ed25519", "-out", key)
    return workplace.call("openssl", "pkey", "-in", key, "-pubout").splitlines()[1]


def start_site(workplace: Workplace, name: str, data: Path, public: dict[str, str]) -> None:
    peers = "\n".join(f'{peer} = "{key}"' for peer, key in public.items() if peer != name)
    config = workplace.root / f"{name}.toml"
    config.write_text(
        f'name = "{name}"\ndata-dir = "{data}"\ncache-dir = "{workplace.root / f"cache-{name}"}"\n'
        f'device = "cpu"\nthreads = 1\nsigning-key = "{workplace.root / f"{name}.pem"}"\n'
        f"[peers]\n{peers}\n"
    )
    workplace.supernode(name, {"site-config": str(config)})


def test_pinned_supernodes_sign_and_refuse_an_invented_peer(
    workplace: Workplace, phantoms: Path
) -> None:
    workplace.superlink()
    workplace.connection("insecure = true")
    public = {name: make_key(workplace, name) for name in SITES}
    for name in SITES:
        start_site(workplace, name, phantoms / name, public)
    workplace.wait_online(3)
    config = {**SECURE, "federation.rounds": 1}
    run = workplace.deploy({**config, "federation.sites": 3}, seconds=600)
    assert run.status == "finished:completed"
    line = run.history()[1]
    assert line["secagg"]["signed"] is True and line["secagg"]["summed"] == 3
    assert line["scored"]["signed"] is True and line["federated"]["cases"] == 3
    assert set(line["secagg"]["seconds"]) == {"keys", "shares", "words", "confirm", "unmask"}

    # One more joins with a good key of its own, which no site has pinned.
    invented = {**public, INVENTED: make_key(workplace, INVENTED)}
    start_site(workplace, INVENTED, phantoms / "site-0", invented)
    workplace.wait_online(4)
    refused = workplace.deploy({**config, "federation.sites": 4}, seconds=600)
    assert refused.status == "finished:failed"
    assert refused.manifest()["status"] == "failed"
    line = refused.history()[1]
    assert "threshold" in line["failed"] and "secagg" not in line
    reasons = {name: line["sites"][name]["reason"] for name in SITES}
    assert set(reasons.values()) == {"secure-aggregation"}
    logs = dict(workplace.logs())
    assert all(f"got '{INVENTED}'; expected only pinned peers" in logs[name] for name in SITES)
