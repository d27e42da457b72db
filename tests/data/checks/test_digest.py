"""Tests of the digests that recognise a scan again."""

import numpy as np
import pytest

from fedseg.data.checks.digest import case_digest, content_digest

KEY = b"k" * 32


def scan(seed: int = 0, shape: tuple[int, int, int] = (12, 13, 14)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 300, shape).astype(np.float32).round()


def test_copies_have_the_same_digest() -> None:
    one = scan()
    for copy in (one[::-1], one[:, ::-1, ::-1], one.transpose(2, 0, 1), one + np.float32(0.2)):
        assert content_digest(np.ascontiguousarray(copy)) == content_digest(one)


def test_other_scans_have_another() -> None:
    one = scan()
    changed = one.copy()
    changed[0, 0, 0] += 1
    others = [changed, scan(1), one[1:], one / 1000, one * 1e35, one * 0, one * 0 + 1]
    digests = {content_digest(np.ascontiguousarray(other)) for other in [one, *others]}
    assert len(digests) == 1 + len(others) - 1  # two scans of one value each are alike


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    one = scan()
    whole = content_digest(one), content_digest(one / 1000)
    monkeypatch.setattr("fedseg.data.checks.digest._CHUNK", 100)
    assert (content_digest(one), content_digest(one / 1000)) == whole


def test_the_key_decides() -> None:
    one = scan()
    digest = case_digest(one, KEY)
    assert len(digest) == 64 and int(digest, 16)
    assert case_digest(one[::-1].copy(), KEY) == digest
    assert case_digest(one, b"q" * 32) != digest
    assert digest != content_digest(one).hex()
    with pytest.raises(ValueError, match="at least 16 bytes"):
        case_digest(one, b"short")
