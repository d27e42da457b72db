"""Tests of signed bundles; oracles are the SuperNode's own check and the SuperLink's own query."""

import json
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.supercore.fab import Fab
from flwr.supercore.utils import request_download_link
from flwr.superlink.servicer.control.control_handlers import _format_verification
from flwr.supernode.cli.flower_supernode import _validate_public_keys_ed25519
from flwr.supernode.start_client_internal import _verify_fab

from fedseg.errors import DataError
from fedseg.federation.signed_bundle import (
    app_spec,
    bundle_server,
    read_signing_key,
    sign_bundle,
    trusted_line,
)

PYPROJECT = '[project]\nname = "net"\nversion = "1.2.3"\n[tool.flwr.app]\npublisher = "clinic"\n'


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "net.fab"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pyproject.toml", PYPROJECT)
        archive.writestr("net/app.py", "app = 1\n")
    return path


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    with bundle_server(bundle, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def fetched(address: str) -> Fab:
    """A bundle as a SuperLink fetches it and hands it to SuperNodes."""
    link, signatures, _ = request_download_link(
        "@clinic/net", "1.2.3", f"{address}/hub/fetch-fab", "fab_url"
    )
    assert signatures is not None
    content = requests.get(link, timeout=10).content
    return Fab("", content, _format_verification(signatures))


def trusted(*pairs: tuple[Ed25519PrivateKey, str]) -> dict[str, str]:
    lines = [trusted_line(key, name).split(": ", 1) for key, name in pairs]
    entities = {name: line.strip("'") for name, line in lines}
    _validate_public_keys_ed25519(entities)
    return entities


def test_supernode_takes_what_a_trusted_signer_signed(bundle: Path) -> None:
    mine, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    sign_bundle(bundle, other, signer="bonn")
    sign_bundle(bundle, mine, signer="aachen")
    with served(bundle) as address:
        fab = fetched(address)
    assert fab.content == bundle.read_bytes()
    assert _verify_fab(fab, trusted((mine, "aachen")))
    assert _verify_fab(fab, trusted((other, "bonn")))
    assert not _verify_fab(fab, trusted((mine, "chemnitz")))
    assert not _verify_fab(fab, trusted((other, "aachen")))


def test_changed_bundle_is_refused(bundle: Path) -> None:
    key = Ed25519PrivateKey.generate()
    sign_bundle(bundle, key, signer="aachen")
    with zipfile.ZipFile(bundle, "a") as archive:
        archive.writestr("net/more.py", "import os\n")
    with served(bundle) as address:
        assert not _verify_fab(fetched(address), trusted((key, "aachen")))
        sign_bundle(bundle, key, signer="aachen")  # is read anew
        assert _verify_fab(fetched(address), trusted((key, "aachen")))


def test_signing_again_replaces_the_own_signature_alone(bundle: Path) -> None:
    first, second = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    sign_bundle(bundle, first, signer="aachen")
    sign_bundle(bundle, first, signer="bonn")
    path = sign_bundle(bundle, second, signer="aachen")
    found = json.loads(path.read_text())
    assert sorted(entry["public_key_id"] for entry in found) == ["aachen", "bonn"]
    with served(bundle) as address:
        assert _verify_fab(fetched(address), trusted((second, "aachen")))


def test_hub_has_just_this_bundle(bundle: Path) -> None:
    sign_bundle(bundle, Ed25519PrivateKey.generate(), signer="aachen")
    with served(bundle) as address:
        url = f"{address}/hub/fetch-fab"
        with pytest.raises(ValueError, match="not found"):
            request_download_link("@clinic/other", None, url, "fab_url")
        with pytest.raises(ValueError, match=r"1\.2\.3"):
            request_download_link("@clinic/net", "9.9.9", url, "fab_url")
        assert request_download_link("@clinic/net", None, url, "fab_url")[0].endswith("/fab")
        assert requests.get(f"{address}/../net.fab", timeout=10).status_code == 404
        for body in (b"", b"[]", b"{", b"\xff"):
            assert requests.post(url, data=body, timeout=10).status_code == 404
        assert requests.post(f"{address}/other", json={}, timeout=10).status_code == 404


def test_unsigned_bundle_is_not_served(bundle: Path) -> None:
    with pytest.raises(DataError, match="nobody signed it"):
        bundle_server(bundle, port=0)


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_other_files_are_no_bundle(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.fab"
    if content is not None:
        path.write_bytes(content)
    for work in (app_spec, lambda p: sign_bundle(p, Ed25519PrivateKey.generate(), signer="a")):
        with pytest.raises(DataError, match="no app bundle"):
            work(path)


def test_zip_without_app_is_no_bundle(tmp_path: Path) -> None:
    path = tmp_path / "net.fab"
    for text in ("", "[project]\nname = 'x'\n", "tool = 1\n"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("pyproject.toml", text)
        with pytest.raises(DataError, match="no app bundle"):
            app_spec(path)


def packed(path: Path, content: str, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("pyproject.toml", content)
    return path.read_bytes()


def changed(content: bytes, *, local: int, central: int, value: int) -> bytes:
    """Change a field of two bytes in both headers of a zip of one file."""
    spoilt = bytearray(content)
    spoilt[local : local + 2] = value.to_bytes(2, "little")
    at = spoilt.index(b"PK\x01\x02") + central
    spoilt[at : at + 2] = value.to_bytes(2, "little")
    return bytes(spoilt)


def one_line(path: Path, why: str) -> None:
    with pytest.raises(DataError, match=f"no app bundle .*{why}.*; make one") as caught:
        sign_bundle(path, Ed25519PrivateKey.generate(), signer="aachen")
    assert "\n" not in str(caught.value)


def test_bundle_that_unpacks_to_too_much(bundle: Path) -> None:
    packed(bundle, PYPROJECT + "#" * 30_000_000)
    assert bundle.stat().st_size < 100_000
    tracemalloc.start()
    try:
        one_line(bundle, "pyproject.toml has more than 65536 bytes")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    packed(bundle, PYPROJECT + "#" * (65536 - len(PYPROJECT)))
    assert app_spec(bundle) == ("@clinic/net", "1.2.3")


def test_damaged_bundles_are_one_line(bundle: Path) -> None:
    content = packed(bundle, PYPROJECT)
    start = 30 + len("pyproject.toml")
    bundle.write_bytes(content[:start] + b"\xff\xff" + content[start + 2 :])
    one_line(bundle, "decompressing")
    bundle.write_bytes(changed(content, local=6, central=8, value=1))
    one_line(bundle, "encrypted")
    bundle.write_bytes(changed(content, local=8, central=10, value=99))
    one_line(bundle, "not supported")
    content = packed(bundle, PYPROJECT, zipfile.ZIP_LZMA)
    bundle.write_bytes(content[: start + 9] + b"\xff" * 9 + content[start + 18 :])
    one_line(bundle, "Corrupt")
    packed(bundle, "name = " + "[" * 5000)
    one_line(bundle, "")


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_damaged_signatures(bundle: Path, text: str) -> None:
    bundle.with_name("net.fab.signatures.json").write_text(text)
    with pytest.raises(DataError, match="damaged"):
        sign_bundle(bundle, Ed25519PrivateKey.generate(), signer="aachen")


class TestKeys:
    def test_as_ssh_keygen_writes_it(self, tmp_path: Path) -> None:
        key = Ed25519PrivateKey.generate()
        content = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        (tmp_path / "key").write_bytes(content)
        read = read_signing_key(tmp_path / "key")
        assert read.public_key() == key.public_key()

    def test_other_kinds_and_files(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        with pytest.raises(DataError, match="No such file"):
            read_signing_key(path)
        path.write_text("no key")
        with pytest.raises(DataError, match="no key that can be read"):
            read_signing_key(path)
        rsa = generate_private_key(65537, 2048)
        path.write_bytes(rsa.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        with pytest.raises(DataError, match="another kind of key"):
            read_signing_key(path)
