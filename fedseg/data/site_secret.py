"""A site's own secret: 32 bytes that lie beside its ledger and never leave."""

import os
import secrets
from pathlib import Path

from fedseg.errors import LedgerError

__all__ = ["site_secret"]

_BYTES = 32


def site_secret(ledger: Path) -> bytes:
    """Read the secret beside a ledger; it is made where there is none, for its owner alone to read.

    Args:
        ledger: The ledger's file, which needn't be there.

    Raises:
        LedgerError: It can't be read or written, or is damaged.
    """
    path = ledger.with_suffix(".key")
    try:
        if not path.exists():
            _make(path)
        found = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"{path}: can't be used ({error.strerror}); check its folder") from None
    if len(found) != _BYTES:
        raise LedgerError(
            f"{path}: got {len(found)} bytes; expected {_BYTES}; bring back the file from a backup"
        )
    return found


def _make(path: Path) -> None:
    """Whole or not at all, one for all processes of the site."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(fresh, path)
    except FileExistsError:
        pass  # another process was faster
    finally:
        fresh.unlink()
