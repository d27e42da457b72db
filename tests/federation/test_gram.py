"""Tests of inner products against numpy in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from updates import spooled

from fedseg.federation import gram as module
from fedseg.federation.compression import SCHEMES
from fedseg.federation.gram import gram, squared_distances, squared_norms


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("size", [1, 4096, 4097, 30_001])
def test_products_of_all_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    monkeypatch.setattr(module, "_STACK", 10_000)  # several chunks, the last one short
    vectors = np.random.default_rng(size).standard_normal((count, size)).astype(np.float32)
    updates, exact = spooled(tmp_path, list(vectors)), vectors.astype(np.float64)
    products = gram(updates)
    np.testing.assert_allclose(products, exact @ exact.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(squared_norms(updates), (exact**2).sum(1), rtol=1e-12)
    apart = ((exact[:, None] - exact[None]) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(products), apart, rtol=1e-9, atol=1e-9)


def test_small_distances_between_large_updates_are_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = 1e3 * rng.standard_normal(20_000)
    vectors = [(base + 1e-2 * rng.standard_normal(20_000)).astype(np.float32) for _ in range(3)]
    exact = np.array(vectors, np.float64)
    apart = ((exact[:, None] - exact[None]) ** 2).sum(-1)
    found = squared_distances(gram(spooled(tmp_path, vectors))).numpy()
    np.testing.assert_allclose(found, apart, rtol=1e-3)


def test_the_largest_updates_do_not_overflow(tmp_path: Path) -> None:
    updates = spooled(tmp_path, [np.full(5000, 2.0**119), np.full(5000, -(2.0**119))])
    assert torch.isfinite(gram(updates)).all()
    assert squared_norms(updates) == [5000 * 2.0**238] * 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_updates_count_as_what_they_decode_to(tmp_path: Path, scheme: str) -> None:
    vectors = np.random.default_rng(1).standard_normal((3, 9000)) * 1e-3
    updates = spooled(tmp_path, list(vectors), scheme=scheme)
    exact = torch.stack([update.chunk(0, 9000) for update in updates]).double()
    torch.testing.assert_close(gram(updates), exact @ exact.T)
