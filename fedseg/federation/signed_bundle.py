"""Sign an app bundle (FAB), and hand it with its signatures to a SuperLink, without internet.

A SuperNode with `--trusted-entities` runs only a bundle that one of these has signed. It takes
bundle and signatures from the SuperLink, which takes them, in flwr 1.42, from Flower Hub alone:
`flwr run .` sends a bundle without. So `bundle_server` is a hub of one bundle, on this machine,
where a SuperLink looks for one if `FLWR_SUPERGRID_API_URL` says so. Nobody has to trust it, or the
SuperLink: the signature is checked at the SuperNode, over the very bundle that it runs.
"""

import base64
import hashlib
import json
import lzma
import struct
import time
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tomli
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)

from fedseg.data.whole_file import replace_file
from fedseg.errors import DataError

__all__ = ["app_spec", "bundle_server", "read_signing_key", "sign_bundle", "trusted_line"]

_MOST_BYTES = 10 * 1024 * 1024
"""Flower's own limit for a bundle."""

_LONGEST_PYPROJECT = 64 * 1024
"""Unpacked; FedSeg's own has 8 KiB."""

_DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,  # encrypted; NotImplementedError and RecursionError are of its kind
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)
"""What zipfile and tomli raise for a bundle that is none."""

_LONGEST_REQUEST = 64 * 1024
_SIGNATURES = ".signatures.json"


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 key as `ssh-keygen -t ed25519` writes it, without a passphrase.

    Raises:
        DataError: It can't be read, is another kind, or needs a passphrase.
    """
    try:
        key = load_ssh_private_key(path.expanduser().read_bytes(), password=None)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected an Ed25519 key") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DataError(
            f"{path}: got no key that can be read ({error}); expected what ssh-keygen -t ed25519 "
            "writes, without passphrase"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{path}: got another kind of key; expected ssh-keygen -t ed25519")
    return key


def trusted_line(key: Ed25519PrivateKey, signer: str) -> str:
    """Line for the YAML file of `flower-supernode --trusted-entities`."""
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return f"{signer}: '{public}'"


def sign_bundle(bundle: Path, key: Ed25519PrivateKey, *, signer: str) -> Path:
    """Add a signature, in the form that SuperNodes check; one of the same signer is replaced.

    What is signed is the time, 8 bytes, and the bundle's SHA-256.

    Args:
        bundle: What `flwr build` wrote.
        key: The signer's key.
        signer: Name under which sites trust it.

    Returns:
        `<bundle>.signatures.json`.

    Raises:
        DataError: It isn't a bundle, or its file of signatures is damaged.
    """
    app_spec(bundle)
    now = int(time.time())
    digest = hashlib.sha256(bundle.read_bytes()).digest()
    signature = base64.urlsafe_b64encode(key.sign(now.to_bytes(8, "big") + digest)).decode()
    others = [one for one in _signatures(bundle) if one.get("public_key_id") != signer]
    entry = {"public_key_id": signer, "signature": signature.rstrip("="), "signed_at": now}
    path = _signatures_file(bundle)
    replace_file(path, json.dumps([*others, entry], indent=2).encode() + b"\n")
    return path


def _signatures_file(bundle: Path) -> Path:
    return bundle.with_name(bundle.name + _SIGNATURES)


def _signatures(bundle: Path) -> list[dict[str, Any]]:
    path = _signatures_file(bundle)
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(f"{path}: damaged; delete it and sign again")
    return found


def app_spec(bundle: Path) -> tuple[str, str]:
    """Name and version of a bundle: `@fedseg/fedseg`, `0.1.0`.

    Raises:
        DataError: It isn't a bundle.
    """
    try:
        if bundle.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        with zipfile.ZipFile(bundle) as archive:
            config = tomli.loads(_pyproject(archive).decode())
        name = f"@{config['tool']['flwr']['app']['publisher']}/{config['project']['name']}"
        return name, str(config["project"]["version"])
    except _DAMAGED as error:
        raise DataError(f"{bundle}: no app bundle ({error}); make one with flwr build") from None


def _pyproject(archive: zipfile.ZipFile) -> bytes:
    """Unpack no more than the limit, whatever the bundle says of its size."""
    entry = archive.getinfo("pyproject.toml")
    content = b""
    if entry.file_size <= _LONGEST_PYPROJECT:
        with archive.open(entry) as file:
            content = file.read(_LONGEST_PYPROJECT + 1)
    if max(entry.file_size, len(content)) > _LONGEST_PYPROJECT:
        raise ValueError(f"pyproject.toml has more than {_LONGEST_PYPROJECT} bytes")
    return content


def bundle_server(bundle: Path, *, port: int) -> ThreadingHTTPServer:
    """Make a hub of one bundle on 127.0.0.1; the caller lets it serve.

    Bundle and signatures are read anew for each request.

    Raises:
        DataError: It isn't a bundle, or nobody signed it.
    """
    app_spec(bundle)
    if not _signatures(bundle):
        raise DataError(f"{bundle}: nobody signed it; sign it with fedseg sign")

    class Hub(BaseHTTPRequestHandler):
        """Answers what a SuperLink asks Flower Hub."""

        def do_POST(self) -> None:
            """Tell where the bundle is, and who signed it."""
            asked = self._json()
            name, version = app_spec(bundle)
            wanted = (asked.get("app_id"), asked.get("app_version") or version)
            if self.path != "/hub/fetch-fab" or wanted != (name, version):
                self._send(404, {"detail": {"available_app_versions": [version]}})
                return
            address = f"http://127.0.0.1:{server.server_port}/fab"
            self._send(200, {"fab_url": address, "verifications": _signatures(bundle)})

        def do_GET(self) -> None:
            """Hand out the bundle."""
            if self.path != "/fab":
                self._send(404, {"detail": "not here"})
                return
            self._send_bytes(200, bundle.read_bytes(), "application/octet-stream")

        def _json(self) -> dict[str, Any]:
            try:
                length = int(self.headers.get("Content-Length", "0"))
                body = (
                    json.loads(self.rfile.read(length)) if 0 <= length <= _LONGEST_REQUEST else None
                )
            except ValueError:
                body = None
            return body if isinstance(body, dict) else {}

        def _send(self, status: int, content: object) -> None:
            self._send_bytes(status, json.dumps(content).encode(), "application/json")

        def _send_bytes(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", port), Hub)
    return server
