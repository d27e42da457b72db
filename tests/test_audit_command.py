"""Tests of the commands audit and sign: what they print and how they exit."""

import json
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedseg.privacy.ledger import append

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ledgers(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path in paths:
        for number in range(3):
            append(path, {"kind": "left", "round": number})
    return paths


def test_whole_ledgers(fedseg: Command, ledgers: list[Path]) -> None:
    code, out, _ = fedseg("audit", "--ledger", *ledgers)
    assert code == 0
    assert out.count("3 lines hold together, head ") == 3


def test_one_broken_ledger(fedseg: Command, ledgers: list[Path]) -> None:
    ledgers[1].write_bytes(ledgers[1].read_bytes().replace(b'"round":1', b'"round":7'))
    code, out, _ = fedseg("audit", "--ledger", *ledgers)
    assert code == 1
    assert f"error: {ledgers[1]}: line 2: was changed" in out
    code, out, _ = fedseg("audit", "--json", "--ledger", *ledgers)
    assert code == 1
    assert [entry["error"] is None for entry in json.loads(out)] == [True, False, True]


def test_torn_line_is_told_of_and_no_error(fedseg: Command, ledgers: list[Path]) -> None:
    with ledgers[0].open("ab") as file:
        file.write(b'{"sequ')
    code, out, _ = fedseg("audit", "--ledger", ledgers[0])
    assert code == 0
    assert "6 bytes of a torn line" in out


def test_unusable_arguments(fedseg: Command, ledgers: list[Path], tmp_path: Path) -> None:
    code, _, error = fedseg("audit", "--ledger", tmp_path / "none.jsonl")
    assert (code, "no such file" in error) == (2, True)
    code, _, error = fedseg("audit", "--run", tmp_path / "none", "--ledger", *ledgers)
    assert (code, "no run folder" in error) == (2, True)
    assert fedseg("audit")[0] == 2


def test_run_that_knows_nothing_of_a_ledger(
    fedseg: Command, ledgers: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text('{"run": "r", "received": []}')
    (run / "history.jsonl").write_text("")
    code, out, _ = fedseg("audit", "--run", run, "--ledger", ledgers[0])
    assert code == 1
    assert f"error: {ledgers[0]}: the server has no hash of any line" in out
    code, out, _ = fedseg("audit", "--run", run, "--ledger", ledgers[0], "--json")
    assert (code, json.loads(out)["clean"]) == (1, False)


def test_sign_and_hub(fedseg: Command, tmp_path: Path) -> None:
    bundle, key = tmp_path / "net.fab", tmp_path / "key"
    text = '[project]\nname = "net"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "clinic"\n'
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("pyproject.toml", text)
    private = Ed25519PrivateKey.generate()
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    code, out, _ = fedseg("sign", bundle, "--key", key, "--signer", "aachen")
    assert code == 0
    assert "aachen: 'ssh-ed25519 " in out
    assert (tmp_path / "net.fab.signatures.json").is_file()
    code, _, error = fedseg("sign", key, "--key", key, "--signer", "aachen")
    assert (code, "no app bundle" in error) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        code, out, error = fedseg("hub", bundle, "--port", port)
    assert (code, out) == (2, "")
    busy_port = f"fedseg: --port: got {port}, can't be opened (Address already in use); give"
    assert error.startswith(busy_port) and error.count("\n") == 1
    bundle.with_name("net.fab.signatures.json").unlink()
    code, _, error = fedseg("hub", bundle)
    assert (code, "nobody signed it" in error) == (2, True)
