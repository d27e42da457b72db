"""Masks: streams of AES-256-CTR under a key of their own, added to uint32 words in place."""

import sys

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["Words", "add_mask"]

Words = np.ndarray[tuple[int], np.dtype[np.uint32]]
"""uint32 `[W]`; sums of words are modulo 2^32."""

_CHUNK = 2**16
"""Words at a time: key stream and words stay in the processor's cache."""


def add_mask(words: Words, key: bytes, *, subtract: bool = False) -> None:
    """Add a mask to words in place, modulo 2^32, or take it off.

    The mask is the key stream of AES-256 in counter mode as little-endian words. The counter starts
    at 0, so a key is for one mask only. Memory is 512 KiB for any number of words.

    Args:
        words: uint32 `[W]`.
        key: 32 bytes.
        subtract: Take it off.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = bytes(4 * _CHUNK), bytearray(4 * _CHUNK)
    mask = np.frombuffer(buffer, np.uint32)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        count = len(part)
        stream.update_into(memoryview(zeros)[: 4 * count], buffer)
        if sys.byteorder == "big":
            mask.byteswap(inplace=True)
        (np.subtract if subtract else np.add)(part, mask[:count], out=part)
