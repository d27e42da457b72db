"""Tests of cleaning labels, against a flood fill in plain Python."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedseg.segmentation.postprocess import clean_labels, lesion_count

Voxel = tuple[int, int, int]
SMALL = arrays(
    np.uint8,
    st.tuples(*[st.integers(1, 5)] * 3),
    elements=st.sampled_from([0, 0, 0, 0, 1, 2]),
)


def flood(region: np.ndarray) -> list[set[Voxel]]:
    """Components of a region; voxels that share a corner belong together."""
    left = {(int(x), int(y), int(z)) for x, y, z in np.argwhere(region)}
    found = []
    while left:
        waiting = [min(left)]
        left.remove(waiting[0])
        component = set(waiting)
        while waiting:
            x, y, z = waiting.pop()
            for a, b, c in itertools.product((-1, 0, 1), repeat=3):
                near = (x + a, y + b, z + c)
                if near in left:
                    left.remove(near)
                    component.add(near)
                    waiting.append(near)
        found.append(component)
    return found


def expected(labels: np.ndarray, *, largest_liver: bool, tumor_in_liver: bool) -> np.ndarray:
    result = labels.copy()
    components = flood(labels >= 1)
    livers = [part for part in components if any(labels[at] == 1 for at in part)]
    largest = max(livers, key=len, default=set())
    for part in components:
        kept = part in livers and (part is largest or not largest_liver)
        for at in part:
            if (labels[at] == 1 and not kept) or (labels[at] == 2 and tumor_in_liver and not kept):
                result[at] = 0
    return result


@given(labels=SMALL, largest_liver=st.booleans(), tumor_in_liver=st.booleans())
def test_it_is_what_a_flood_fill_says(
    labels: np.ndarray, largest_liver: bool, tumor_in_liver: bool
) -> None:
    livers = sorted(len(p) for p in flood(labels >= 1) if any(labels[at] == 1 for at in p))
    if livers[-2:-1] == livers[-1:]:
        return  # two largest ones: either may stay
    before = labels.copy()
    how = {"largest_liver": largest_liver, "tumor_in_liver": tumor_in_liver}
    cleaned = clean_labels(labels, **how)
    assert np.array_equal(labels, before)
    assert np.array_equal(cleaned, expected(labels, **how))
    assert np.array_equal(clean_labels(cleaned, **how), cleaned)
    assert cleaned.dtype == np.uint8


@given(labels=SMALL, axes=st.permutations(range(3)))
def test_it_does_not_matter_how_the_volume_is_turned(labels: np.ndarray, axes: list[int]) -> None:
    how = {"largest_liver": False, "tumor_in_liver": True}
    turned = clean_labels(labels.transpose(axes)[::-1], **how)
    assert np.array_equal(turned, clean_labels(labels, **how).transpose(axes)[::-1])


@given(labels=SMALL)
def test_lesions_are_counted_as_a_flood_fill_counts(labels: np.ndarray) -> None:
    assert lesion_count(labels) == len(flood(labels == 2))


def scene() -> np.ndarray:
    """A liver that a tumour cuts in two, a piece of liver apart with a tumour, a lone tumour."""
    labels = np.zeros((40, 9, 9), np.uint8)
    labels[1:21, 1:8, 1:8] = 1
    labels[9:12, 1:8, 1:8] = 2
    labels[24:30, 2:6, 2:6], labels[30, 6, 6] = 1, 2
    labels[34:39, 1:8, 1:8] = 2
    return labels


@pytest.mark.parametrize(
    ("largest_liver", "tumor_in_liver", "volumes"),
    [
        (False, False, (17 * 49 + 6 * 16, 3 * 49 + 1 + 5 * 49)),
        (True, False, (17 * 49, 3 * 49 + 1 + 5 * 49)),
        (False, True, (17 * 49 + 6 * 16, 3 * 49 + 1)),
        (True, True, (17 * 49, 3 * 49)),
    ],
)
def test_a_tumour_is_part_of_the_liver_that_it_touches(
    largest_liver: bool, tumor_in_liver: bool, volumes: tuple[int, int]
) -> None:
    labels = clean_labels(scene(), largest_liver=largest_liver, tumor_in_liver=tumor_in_liver)
    assert tuple(int((labels == label).sum()) for label in (1, 2)) == volumes


def test_a_lone_tumour_is_no_liver_however_large() -> None:
    labels = np.zeros((20, 6, 6), np.uint8)
    labels[:12], labels[15:17] = 2, 1
    cleaned = clean_labels(labels, largest_liver=True, tumor_in_liver=False)
    assert np.array_equal(cleaned, labels)
    cleaned = clean_labels(labels, largest_liver=True, tumor_in_liver=True)
    assert [int((cleaned == label).sum()) for label in (1, 2)] == [72, 0]


def test_nothing_to_do_gives_the_same_array() -> None:
    empty = np.zeros((4, 5, 6), np.uint8)
    whole = np.zeros((4, 5, 6), np.uint8)
    whole[1:3, 1:3, 1:3], whole[2, 2, 2] = 1, 2
    for labels in (empty, whole):
        assert clean_labels(labels, largest_liver=True, tumor_in_liver=True) is labels
    assert clean_labels(scene(), largest_liver=False, tumor_in_liver=False).sum() == scene().sum()
