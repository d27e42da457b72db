"""A SuperNode with `--trusted-entities` runs a bundle signed by someone it trusts, and no other."""

import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from processes import CHECKOUT, SMALL, Process, Workplace, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = {
    **SMALL,
    "federation.rounds": 1,
    "federation.min-sites": 1,
    "federation.connect-deadline": 30,
    "federation.personal": False,
}


def signed_by(workplace: Workplace, name: str, bundle: Path) -> str:
    """Make a key, sign the bundle with it, and return the line with which a site trusts it."""
    path = workplace.root / f"{name}-key"
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    shown = workplace.call("fedseg", "sign", bundle, "--key", path, "--signer", name)
    (line,) = re.findall(rf"^{name}: 'ssh-ed25519 .*'$", shown, re.MULTILINE)
    return str(line)


@pytest.fixture(scope="module")
def node(workplace: Workplace, phantoms: Path) -> Process:
    """A node that trusts the signer of the bundle in the hub of its SuperLink."""
    root = workplace.root
    workplace.call("flwr", "build", "--app", CHECKOUT, cwd=root / "empty")
    (built,) = (root / "empty").glob("*.fab")
    bundle = built.rename(root / "study.fab")
    trusted = root / "trusted.yaml"
    trusted.write_text(signed_by(workplace, "reviewer", bundle) + "\n")
    port = free_port()
    hub = workplace.start("hub", "fedseg", "hub", bundle, "--port", str(port))
    wait_until(lambda: "flwr run @fedseg/fedseg==0.1.0" in hub.text(), "the hub serves")
    workplace.superlink(env={"FLWR_SUPERGRID_API_URL": f"http://127.0.0.1:{port}"})
    workplace.connection("insecure = true")
    node = workplace.supernode(
        "site-0",
        {"data-dir": str(phantoms / "site-0"), "device": "cpu", "threads": 1},
        *("--insecure", "--trusted-entities", trusted),
    )
    workplace.wait_online(1)
    return node


def test_signed_bundle_runs(workplace: Workplace, node: Process) -> None:
    run = workplace.deploy(CONFIG, app="@fedseg/fedseg==0.1.0")
    assert run.status == "finished:completed"
    assert run.history()[1]["sites"]["site-0"]["status"] == "ok"


def test_unsigned_bundle_is_refused(workplace: Workplace, node: Process) -> None:
    run = workplace.deploy(CONFIG)
    assert run.status == "finished:failed"
    assert run.folder is None
    assert "its node runs only a bundle signed by someone it trusts" in run.output
    assert "App verification is not supported" in node.text()


def test_bundle_signed_by_a_stranger_is_refused(workplace: Workplace, node: Process) -> None:
    bundle = workplace.root / "study.fab"
    (workplace.root / "study.fab.signatures.json").unlink()
    signed_by(workplace, "stranger", bundle)
    run = workplace.deploy(CONFIG, app="@fedseg/fedseg==0.1.0")
    assert run.status == "finished:failed"
    assert run.folder is None
    assert "could not verify the FAB" in node.text()
