"""Gaussian noise that nobody can foretell: under a fresh key of the operating system's entropy.

The study's seed is known to every site, so noise must not derive from it: whoever can draw the same
numbers can take them off. A real run therefore draws no two times the same noise.
"""

import secrets

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri

__all__ = ["add_noise", "fresh_key"]

_CHUNK = 2**16
"""Values at a time: stream, uniforms and normals stay in the processor's cache."""


def fresh_key() -> bytes:
    """32 bytes of the operating system's entropy."""
    return secrets.token_bytes(32)


def add_noise(
    values: npt.NDArray[np.float32], deviation: float, *, key: bytes | None = None
) -> None:
    """Add N(0, deviation^2) to each value, in place.

    Uniforms of 53 bits from the key stream of AES-256 in counter mode go through the inverse of the
    normal distribution. Noise is drawn and added in double precision and only the sum is rounded to
    float32: any float32 near a value can be reached from it, which leaves little to the attack on
    the low bits of noise that is rounded before it is added (Mironov, CCS 2012).

    Args:
        values: float32 `[N]`.
        deviation: Standard deviation, in the units of the values.
        key: 32 bytes, for one vector only; a fresh one by default. Tests give one.
    """
    stream = Cipher(algorithms.AES256(key or fresh_key()), modes.CTR(bytes(16))).encryptor()
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        words = np.frombuffer(stream.update(bytes(8 * len(part))), "<u8")
        normal = ndtri(((words >> np.uint64(11)) + 0.5) * 2.0**-53)
        normal *= deviation
        normal += part
        part[:] = normal
