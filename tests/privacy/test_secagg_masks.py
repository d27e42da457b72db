"""Masks look like noise, and come off again."""

import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.stats import chi2

from fedseg.privacy.secagg_masks import add_mask

KEY = bytes(range(32))


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 300_000])
def test_mask_is_the_key_stream_and_comes_off(size: int) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, size, np.uint32)
    masked = words.copy()
    add_mask(masked, KEY)
    stream = (
        Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(4 * size))
    )
    expected = (words.astype(np.uint64) + np.frombuffer(stream, "<u4")) % 2**32
    np.testing.assert_array_equal(masked, expected)
    add_mask(masked, KEY, subtract=True)
    np.testing.assert_array_equal(masked, words)


def test_memory_does_not_grow_with_the_words() -> None:
    words = np.zeros(4_000_000, np.uint32)
    tracemalloc.start()
    add_mask(words, KEY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_masked_words_are_uniform() -> None:
    """Chi-square over 1e7 words, of high and low bytes and of pairs of neighbours."""
    words = np.full(10_000_000, 7, np.uint32)
    add_mask(words, KEY)
    cells = (words >> 24, words & 0xFF, (words >> 12) & 0xFFF, (words[::2] ^ words[1::2]) >> 24)
    for cell in cells:
        bins = 4096 if cell is cells[2] else 256
        counts = np.bincount(cell, minlength=bins)
        expected = len(cell) / bins
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert chi2.ppf(1e-4, bins - 1) < statistic < chi2.ppf(1 - 1e-4, bins - 1)
