"""A site's signing key and its peers' public keys (Ed25519), as its site config names them."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_private_key

from fedseg.errors import Reason, SiteError
from fedseg.site_config import SiteConfig

__all__ = ["read_identity"]


def read_identity(
    config: SiteConfig,
) -> tuple[Ed25519PrivateKey | None, dict[str, Ed25519PublicKey] | None]:
    """Read the site's signing key and its peers' public keys; None where there are none.

    Raises:
        SiteError: One can't be read, or peers are pinned without an own key.
    """
    try:
        signer = None if config.signing_key is None else _private_key(config.signing_key)
        pinned = None if config.peers is None else _public_keys(config.peers)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SiteError(
            Reason.SITE_CONFIG,
            f"signing-key or peers: got what isn't an Ed25519 key ({error}); expected a PEM file, "
            "and for each peer the base64 line of its public PEM",
        ) from None
    if pinned is not None and signer is None:
        raise SiteError(Reason.SITE_CONFIG, "peers: expected a signing-key, too")
    return signer, pinned


def _private_key(path: str) -> Ed25519PrivateKey:
    key = load_pem_private_key(Path(path).expanduser().read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not Ed25519")
    return key


def _public_keys(peers: Mapping[str, str]) -> dict[str, Ed25519PublicKey]:
    keys = {}
    for name, text in peers.items():
        try:
            key = load_der_public_key(base64.b64decode(text, validate=True))
        except binascii.Error:
            raise ValueError(f"{name}: not base64") from None
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError(f"{name}: not Ed25519")
        keys[name] = key
    return keys
