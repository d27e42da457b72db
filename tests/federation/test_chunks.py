"""Tests of walking over updates chunk by chunk."""

import numpy as np
import pytest
import torch

from fedseg.federation.chunks import for_each_span, spans


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 100_000])
@pytest.mark.parametrize("length", [1, 5000, 40_000, 10**9])
def test_spans_cover_each_value_once_and_begin_at_blocks(size: int, length: int) -> None:
    found = list(spans(size, length))
    assert [value for span in found for value in range(*span)] == list(range(size))
    assert all(start % 4096 == 0 for start, _ in found)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_span_is_worked_on_once(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        counts = np.zeros(50_000, int)

        def work(start: int, stop: int) -> None:
            counts[start:stop] += 1

        for_each_span(work, len(counts), length=5000)
        assert (counts == 1).all()
    finally:
        torch.set_num_threads(1)


def test_what_fails_in_a_thread_is_raised() -> None:
    def work(start: int, stop: int) -> None:
        if start:
            raise ValueError("the file has become shorter")

    with pytest.raises(ValueError, match="shorter"):
        for_each_span(work, 50_000, length=5000)
