"""A clipped vector is within its bound, whatever it was."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedseg.privacy.clipping import clip_factor, norm_of


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    st.floats(1e-6, 1e6),
)
def test_never_past_the_bound_and_never_longer(values: list[float], clip: float) -> None:
    vector = torch.tensor(values)
    norm = norm_of([vector])
    clipped = vector * clip_factor(norm, clip)
    assert norm_of([clipped]) <= clip
    if norm <= clip:
        assert torch.equal(clipped, vector)


def test_norm_is_over_all_tensors_together() -> None:
    assert norm_of([torch.full((2, 2), 2.0), torch.tensor([3.0])]) == 5
    assert norm_of([]) == 0 and clip_factor(0.0, 1.0) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_isnt_finite_counts_for_nothing(bad: float) -> None:
    assert clip_factor(norm_of([torch.tensor([1.0, bad])]), 1.0) == 0
