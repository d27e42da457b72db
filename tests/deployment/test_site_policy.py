"""Every rule of a policy, tripped over TLS by a node known by its key, shown at the server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import FEDERATION, SMALL, Workplace, wait_until
from test_tls import make_certificates, make_node_key

from fedseg.errors import Reason
from fedseg.federation.audit import audit_run
from fedseg.privacy.ledger import read
from fedseg.sections import kebab
from fedseg.site_config import PolicyConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RULES = {
    "allow-custom-code = false": "policy-custom-code",
    "min-cases = 99": "policy-min-cases",
    "max-bytes = 1000": "policy-max-bytes",
    'metrics = ["liver", "tumor"]': "policy-metrics",
    'queries = ["hello", "fingerprint", "evaluate"]': "policy-queries",
    'models = ["unet++"]': "policy-models",
    'strategies = ["fedmedian"]': "policy-strategies",
    "min-peers = 2": "policy-min-peers",
    "require-secure-aggregation = true": "policy-secure-aggregation",
    'privacy-modes = ["local-dp"]': "policy-privacy-modes",
    "max-epsilon = 8": "policy-max-epsilon",
    "min-noise = 1": "policy-min-noise",
    "max-clip = 1": "policy-max-clip",
    "min-evaluation-cases = 99": None,  # the last round's training passes, its evaluation doesn't
}
"""A line of `[policy]` for each round, and the reason that the server must get."""

NO_FINGERPRINT = "share-fingerprint = false"

BROKEN_OTHERWISE = {Reason.POLICY_ERROR, Reason.POLICY_FINGERPRINT, Reason.POLICY_EVALUATION_CASES}
"""Reasons that no round's training can have: two are told of elsewhere, one is a bug."""


NOT_REFUSALS = {"min-count", "fingerprint-min-cases", "fingerprint-epsilon"}
"""Keys that change what a fingerprint shows; see `data/test_fingerprint`, `data/test_node`."""


def set_rule(folder: Path, rule: str) -> None:
    """Write the site's config in one step; each message reads it anew."""
    custom = "" if "allow-custom-code" in rule else "allow-custom-code = true\n"
    path = folder / ".site.toml"
    path.write_text(f'name = "bonn"\n[policy]\n{custom}{rule}\n')
    path.replace(folder / "site.toml")


@contextmanager
def next_rule_each_round(folder: Path, ledger: Path) -> Iterator[None]:
    """Set the next rule as soon as the ledger has a round's answer, before Flower takes it."""
    stop = threading.Event()

    def watch() -> None:
        at = -1
        while not stop.wait(0.02):
            rounds = sum(entry.get("message") == "train" for entry in read(ledger))
            if rounds != at and rounds < len(RULES):
                set_rule(folder, list(RULES)[rounds])
                at = rounds

    # Before the first round a rule that forbids the fingerprint.
    set_rule(folder, NO_FINGERPRINT)
    thread = threading.Thread(target=watch)

    def after_fingerprint() -> bool:
        return any(entry.get("message") == "fingerprint" for entry in read(ledger))

    waiting = threading.Thread(
        target=lambda: (wait_until(after_fingerprint, "fingerprint", seconds=120), thread.start())
    )
    waiting.start()
    try:
        yield
    finally:
        waiting.join()
        stop.set()
        thread.join()


def test_every_rule(workplace: Workplace, phantoms: Path) -> None:
    assert {*RULES.values(), *BROKEN_OTHERWISE, None} == {
        None,
        *(reason for reason in Reason if reason.refused),
    }
    tripped = {line.split(" = ")[0] for line in (*RULES, NO_FINGERPRINT)}
    assert tripped == {kebab(key) for key in PolicyConfig.model_fields} - NOT_REFUSALS
    keys = workplace.root / "keys"
    make_certificates(keys)
    workplace.superlink(
        *("--ssl-ca-certfile", keys / "ca.crt"),
        *("--ssl-certfile", keys / "server.crt"),
        *("--ssl-keyfile", keys / "server.key"),
        "--enable-supernode-auth",
    )
    workplace.connection(f'root-certificates = "{keys / "ca.crt"}"')
    ledgers = {name: workplace.root / f"{name}.jsonl" for name in ("aachen", "bonn")}
    for number, name in enumerate(ledgers):
        folder = phantoms / f"site-{number}"
        (folder / "site.toml").write_text("policy.allow-custom-code = true\n")
        make_node_key(keys / name)
        register = ("flwr", "supernode", "register", keys / f"{name}.pub", FEDERATION)
        workplace.call(*register, "--name", name)
        workplace.supernode(
            name,
            {
                **{"data-dir": str(folder), "device": "cpu", "threads": 1},
                "ledger": str(ledgers[name]),
            },
            *("--root-certificates", keys / "ca.crt"),
            *("--auth-supernode-private-key", keys / name),
        )
    workplace.wait_online(2)
    config = {key: value for key, value in SMALL.items() if key != "train.spacing"}
    with next_rule_each_round(phantoms / "site-1", ledgers["bonn"]):
        run = workplace.deploy(
            {
                **config,
                "train.steps-per-epoch": 1,
                "train.loss": "fedseg.segmentation.losses:dice_ce",
                "federation.sites": "aachen,bonn",
                "federation.min-sites": 1,
                "federation.rounds": len(RULES),
                "federation.evaluate-every": len(RULES),
                "federation.personal": False,
            },
            seconds=600,
        )
    assert run.status == "finished:completed"
    lines = run.history()[1:]
    for line, (rule, reason) in zip(lines, RULES.items(), strict=True):
        site, good = line["sites"]["bonn"], line["sites"]["aachen"]
        assert (rule, site["reason"]) == (rule, reason)
        assert site["status"] == ("refused" if reason else "ok")
        assert good["status"] == "ok"
    assert lines[-1]["sites"]["bonn"]["no_metrics"] == "policy-min-evaluation-cases"
    shared = {e["site"]: e["reason"] for e in run.manifest()["received"] if e["kind"] != "hello"}
    assert shared == {"aachen": None, "bonn": "policy-fingerprint"}

    assert run.folder is not None
    found = audit_run(run.folder, list(ledgers.values()))
    assert not found.problems
    assert found.matched == {"aachen": len(RULES) + 3, "bonn": len(RULES) + 3}
    shown = workplace.call(
        *("fedseg", "audit", "--run", run.folder, "--ledger", *ledgers.values(), "--json")
    )
    assert json.loads(shown)["clean"] is True
