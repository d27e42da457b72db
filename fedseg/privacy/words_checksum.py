"""A checksum of words that adds up like the words themselves.

That of a sum is the sum of those of its parts, modulo 2^32. So who has the ledgers of all sites in
a sum of secure aggregation can check that the server's sum is that of what the sites encoded,
without anybody's words. A difference that isn't made for it goes unnoticed with chance 2^-32 if any
of its words is odd, 2^-31 if any is an odd multiple of 2, and so on; whoever knows the
coefficients, as all do who take part, can make one.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from fedseg.privacy.roster import Terms

__all__ = ["add_checksums", "checksum"]

_CHUNK = 2**20
_MODULUS = 2**32


def checksum(words: npt.NDArray[np.uint32], terms: Terms) -> int:
    """Sum of the words, each times a coefficient drawn by study run and round; modulo 2^32.

    Args:
        words: uint32 `[W]`, before they are masked, or their sum.
        terms: The round's terms.
    """
    seed = hashlib.sha256(f"{terms.run} {terms.round}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(seed, np.uint32))
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        factors = rng.integers(_MODULUS, size=len(part), dtype=np.uint32)
        total += int(np.sum(part * factors, dtype=np.uint64))
    return total % _MODULUS


def add_checksums(parts: list[int]) -> int:
    """Checksum of a sum from those of its parts."""
    return sum(parts) % _MODULUS
