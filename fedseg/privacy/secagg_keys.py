"""Keys of secure aggregation, each derived for one study run, round and pair of sites.

Random secrets have 16 bytes, the size that Shamir shares carry; X25519 has no more than 128 bits of
security either. What a secret is used for comes out of HKDF-SHA256 with a label of its own.
"""

import hashlib
from collections.abc import Mapping, Sequence

from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedseg.errors import ProtocolError

__all__ = [
    "SECRET_BYTES",
    "channel_key",
    "commitment",
    "is_signed",
    "join_secret",
    "mask_key",
    "open_sealed",
    "public_key",
    "seal",
    "self_mask_key",
    "sign",
    "split_secret",
]

SECRET_BYTES = 16
_NAME = b"fedseg-secagg-1"


def public_key(secret: bytes) -> bytes:
    """X25519 public key, 32 bytes, of the private key that a secret of 16 bytes stands for."""
    return _private_key(secret).public_key().public_bytes_raw()


def mask_key(secret: bytes, peer: bytes, context: bytes) -> bytes:
    """Key of the mask that two sites share in a round: each works it out from its own secret.

    Args:
        secret: 16 bytes of one site.
        peer: Public key of the other.
        context: Digest of study run, round and all public keys of the round: another round never
            has the same mask.

    Raises:
        ProtocolError: The public key is none.
    """
    return _agree(secret, peer, b"mask", context)


def channel_key(secret: bytes, peer: bytes, context: bytes, *, sender: int, to: int) -> bytes:
    """Key by which one site encrypts its shares for another; each direction has its own."""
    label = b"shares" + sender.to_bytes(4, "big") + to.to_bytes(4, "big")
    return _agree(secret, peer, label, context)


def self_mask_key(secret: bytes, context: bytes) -> bytes:
    """Key of the mask that a site adds alone."""
    return _derive(secret, b"self-mask", context)


def commitment(secret: bytes) -> bytes:
    """32 bytes that bind a site to its self-mask secret: a wrong share of it is found out."""
    return hashlib.sha256(_NAME + b"|commitment|" + secret).digest()


def _private_key(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derive(secret, b"x25519", b""))


def _agree(secret: bytes, peer: bytes, label: bytes, context: bytes) -> bytes:
    try:
        shared = _private_key(secret).exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:  # a point of low order gives a shared secret that everybody knows
        raise ProtocolError("a public key: got one of low order; expected an X25519 key") from None
    return _derive(shared, label, context)


def _derive(secret: bytes, label: bytes, context: bytes) -> bytes:
    info = b"|".join((_NAME, label, context))
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def seal(key: bytes, shares: Sequence[bytes], context: bytes) -> bytes:
    """Encrypt a site's two shares for one peer by AES-256-GCM; the key is used once."""
    return AESGCM(key).encrypt(bytes(12), b"".join(shares), context)


def open_sealed(key: bytes, sealed: bytes, context: bytes) -> tuple[bytes, bytes]:
    """Decrypt a peer's two shares.

    Raises:
        ProtocolError: They were not encrypted by that peer for this site in this round.
    """
    try:
        shares = AESGCM(key).decrypt(bytes(12), sealed, context)
    except InvalidTag:
        raise ProtocolError("shares: got others than the peer encrypted for this round") from None
    if len(shares) != 2 * SECRET_BYTES:
        raise ProtocolError("shares: got another length; expected two of 16 bytes")
    return shares[:SECRET_BYTES], shares[SECRET_BYTES:]


def split_secret(secret: bytes, *, holders: int, needed: int) -> list[bytes]:
    """Split a secret so that `needed` of the holders restore it, fewer know nothing (Shamir 1979).

    Returns:
        One share of 16 bytes for each holder, in order.
    """
    return [share for _, share in Shamir.split(needed, holders, secret, ssss=False)]


def join_secret(shares: Mapping[int, bytes], *, needed: int) -> bytes:
    """Restore a secret from shares by the place of their holders, from 0; others are left out.

    Wrong shares give a wrong secret: compare with the public key or the commitment.

    Raises:
        ProtocolError: There are too few.
    """
    if len(shares) < needed:
        raise ProtocolError(f"shares: got {len(shares)}; expected at least {needed}")
    chosen = sorted(shares.items())[:needed]
    secret: bytes = Shamir.combine([(place + 1, share) for place, share in chosen], ssss=False)
    return secret


def sign(signer: Ed25519PrivateKey, label: str, *parts: bytes) -> bytes:
    """Sign parts under a label, 64 bytes."""
    return signer.sign(_to_sign(label, parts))


def is_signed(key: Ed25519PublicKey, signature: bytes, label: str, *parts: bytes) -> bool:
    """Tell whether a signature is the key's own over these parts."""
    try:
        key.verify(signature, _to_sign(label, parts))
    except InvalidSignature:
        return False
    return True


def _to_sign(label: str, parts: Sequence[bytes]) -> bytes:
    """Hash each part first, so that no two lists of parts read alike."""
    return b"|".join((_NAME, label.encode(), *(hashlib.sha256(part).digest() for part in parts)))
