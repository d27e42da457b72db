"""A SuperNode with `--trusted-entities` runs a bundle signed by someone it trusts, and no other."""

import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from processes import CHECKOUT, SMALL, Run, Workplace, free_port, wait_until

pytestmark = pytest.mark.slow

CONFIG = {
    **SMALL,
    "federation.rounds": 1,
    "federation.min-sites": 1,
    "federation.connect-deadline": 60,
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


def run_signed(workplace: Workplace) -> Run:
    return workplace.deploy(CONFIG, app="@fedseg/fedseg==0.1.0")


def test_signed_bundle_runs_and_others_do_not(workplace: Workplace, phantoms: Path) -> None:
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

    run = run_signed(workplace)
    assert run.status == "finished:completed"
    assert run.history()[1]["sites"]["site-0"]["status"] == "ok"

    unsigned = workplace.deploy(CONFIG)
    assert unsigned.status == "finished:failed"
    assert unsigned.folder is None
    assert "its node runs only a bundle signed by someone it trusts" in unsigned.output
    assert "App verification is not supported" in node.text()

    (root / "study.fab.signatures.json").unlink()
    signed_by(workplace, "stranger", bundle)
    other = run_signed(workplace)
    assert other.status == "finished:failed"
    assert other.folder is None
    assert "could not verify the FAB" in node.text()
