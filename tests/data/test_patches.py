"""Tests of drawing patches."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.data.augmentation import AIR, RECIPES, Recipe
from fedseg.data.cache import CachedCase
from fedseg.data.patches import batches, cut, draw_centre, draw_sample, patch_start
from fedseg.data.preprocess import Placement


def make_case(
    shape: tuple[int, int, int] = (24, 20, 18), *, seed: int = 0, empty: bool = False
) -> CachedCase:
    """A case whose image tells label and place of every voxel."""
    labels = np.zeros(shape, np.uint8)
    if not empty:
        labels[2:10, 3:9, 3:9] = 1
        labels[4:6, 4:6, 4:6] = 2
    image = (labels.astype(np.float16) - 1) + np.float16(0.001 * seed)
    return CachedCase(
        image=image,
        labels=labels,
        foreground={
            "liver": np.flatnonzero(labels >= 1),
            "tumor": np.flatnonzero(labels == 2),
        },
        truth=labels,
        placement=Placement(
            shape=shape,
            spacing=(1.0, 1.0, 1.0),
            grid=shape,
            box=tuple(slice(0, n) for n in shape),  # type: ignore[arg-type]
        ),
    )


def cut_patch(
    case: CachedCase, centre: tuple[int, ...], size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    start = patch_start(case.image.shape, centre, size)
    return cut(case.image, start, size, fill=AIR), cut(case.labels, start, size, fill=0)


def draw(cases: list[CachedCase], **changes: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options: dict[str, Any] = {
        "steps": 5,
        "batch_size": 2,
        "patch_size": (8, 10, 12),
        "foreground": 0.67,
        "augmentation": "light",
        "rng": np.random.default_rng(0),
    }
    return list(batches(cases, **{**options, **changes}))


def test_shape_and_dtype() -> None:
    drawn = draw([make_case(), make_case(seed=1)])
    assert len(drawn) == 5
    for image, labels in drawn:
        assert image.shape == (2, 1, 8, 10, 12)
        assert labels.shape == (2, 8, 10, 12)
        assert image.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert torch.isfinite(image).all()


def test_same_rng_same_patches_and_another_rng_others() -> None:
    cases = [make_case(), make_case(seed=1), make_case(seed=2)]
    first, again, other = (draw(cases, rng=np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_torch_and_numpy_state_are_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw([make_case()])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw([make_case()])[0][0], first[0][0])


def test_foreground_is_respected_tumour_and_liver_alike() -> None:
    case, rng = make_case(), np.random.default_rng(0)
    drawn = [case.labels[draw_centre(case, rng, foreground=1.0)] for _ in range(2000)]
    count = Counter(int(label) for label in drawn)
    assert count[0] == 0
    tumor_in_liver = 8 / 288
    assert count[2] / 2000 == pytest.approx(0.5 + 0.5 * tumor_in_liver, abs=0.04)
    share = (case.labels > 0).mean()
    for foreground in (0.0, 0.6):
        labels = [case.labels[draw_centre(case, rng, foreground=foreground)] for _ in range(2000)]
        expected = foreground + (1 - foreground) * share
        assert np.mean([label > 0 for label in labels]) == pytest.approx(expected, abs=0.04)


def test_case_without_foreground_is_drawn_anywhere() -> None:
    case, rng = make_case(empty=True), np.random.default_rng(0)
    centres = np.array([draw_centre(case, rng, foreground=1.0) for _ in range(500)])
    assert np.all(centres.min(0) <= 2)
    assert np.all(centres.max(0) >= np.array(case.image.shape) - 3)


def test_drawn_patches_hold_their_region() -> None:
    for _, labels in draw([make_case()], foreground=1.0, steps=20):
        assert (labels.amax((1, 2, 3)) >= 1).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_patch_is_cut_around_its_centre_inside_the_case(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(2, 20)] * 3))
    size = data.draw(st.tuples(*[st.integers(1, 24)] * 3))
    centre = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    case = make_case(shape)
    case.image[centre] = 1.5
    image, labels = cut_patch(case, centre, size)
    assert image.shape == labels.shape == size
    assert image.dtype == np.float16
    assert labels.dtype == np.uint8
    assert np.count_nonzero(image == 1.5) == 1  # the centre is in it
    inside = image != -2.0
    assert inside.sum() == np.prod([min(n, s) for n, s in zip(shape, size, strict=True)])
    assert not labels[~inside].any()


def test_small_case_lies_in_the_middle_of_its_padding() -> None:
    case = make_case((12, 12, 12))
    image, labels = cut_patch(case, (0, 11, 5), (16, 12, 20))
    assert np.array_equal(image[2:14, :, 4:16], case.image)
    assert np.array_equal(labels[2:14, :, 4:16], case.labels)
    assert np.all(image[:2] == -2) and np.all(image[14:] == -2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cut_is_the_padded_array(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    size = data.draw(st.tuples(*[st.integers(1, 12)] * 3))
    start = data.draw(st.tuples(*[st.integers(-15, 12)] * 3))
    array = np.random.default_rng(0).random(shape)
    around = np.pad(array, 30, constant_values=-7)
    box = tuple(slice(30 + a, 30 + a + n) for a, n in zip(start, size, strict=True))
    assert np.array_equal(cut(array, start, size, fill=-7), around[box])


def test_image_and_labels_stay_on_each_other_under_augmentation() -> None:
    """The image is label - 1: what is brightest is tumour, whatever is done to the patch."""
    seen, labelled = 0, 0
    drawn = draw(
        [make_case()], steps=60, patch_size=(16, 16, 16), batch_size=1, augmentation="full"
    )
    for image, labels in drawn:
        assert set(labels.unique().tolist()) <= {0, 1, 2}
        means = [image[0][labels == label].mean().item() for label in range(3)]
        if all(np.isfinite(means)):
            seen += means[0] < means[1] < means[2]
            labelled += 1
    assert labelled > 30 and seen == labelled


def test_a_rotated_and_scaled_patch_keeps_its_place_and_is_air_outside() -> None:
    """A bright block in the case's corner: the patch still holds it, and air beyond the case."""
    case = make_case((40, 40, 40), empty=True)
    case.image[:], case.image[:6, :6, :6], case.labels[:6, :6, :6] = -1, 2, 1
    case.foreground["liver"] = np.flatnonzero(case.labels)
    recipe = Recipe(rotation=(1.0, -20, 20), scale=(1.0, 0.7, 1.4))
    air = 0
    for seed in range(40):
        image, labels = draw_sample(
            case,
            np.random.default_rng(seed),
            patch_size=(20, 20, 20),
            foreground=1,
            recipe=recipe,
            spacing=(1.0, 1.0, 1.0),
            device=torch.device("cpu"),
        )
        assert image.shape == labels.shape == (20, 20, 20)
        assert labels.sum() > 20 and image[labels == 1].median() > 0.5
        assert image.min() > -2.0001 and image.max() < 2.0001
        air += bool((image < AIR + 0.001).any())
    assert air > 10


def test_spacing_decides_what_a_rotation_is() -> None:
    case = make_case()
    flat, thick = (
        draw([case], steps=20, spacing=(1.0, 1.0, z), augmentation="full") for z in (1.0, 4.0)
    )
    same = [torch.equal(a[1], b[1]) for a, b in zip(flat, thick, strict=True)]
    assert any(same) and not all(same)


def test_augmentation_can_be_off_or_named() -> None:
    for image, _ in draw([make_case()], augmentation="none"):
        assert set(np.unique(image)) <= {-2.0, -1.0, 0.0, 1.0}
    light, full = (draw([make_case()], augmentation=name) for name in ("light", "full"))
    assert not torch.equal(light[0][0], full[0][0])


@pytest.mark.parametrize("augmentation", list(RECIPES))
def test_a_sample_is_the_same_in_batches_of_any_size(augmentation: str) -> None:
    cases = [make_case(seed=seed) for seed in range(3)]
    flat = []
    for batch_size in (1, 2, 4):
        drawn = draw(
            cases, steps=12 // batch_size, batch_size=batch_size, augmentation=augmentation
        )
        flat.append([torch.cat(parts) for parts in zip(*drawn, strict=True)])
    for image, labels in flat[1:]:
        assert torch.equal(image, flat[0][0]) and torch.equal(labels, flat[0][1])


def test_a_sample_does_not_depend_on_what_was_drawn_for_those_before() -> None:
    """Cases of other shapes and regions use up other random numbers; the last sample stays."""
    last = make_case(seed=3)
    ends = []
    for others in ([make_case(), make_case()], [make_case(empty=True), make_case((30, 30, 30))]):
        rng = np.random.default_rng(2)
        orders = np.random.default_rng(2).permutation(3)[::-1]
        cases: list[Any] = [None] * 3
        cases[orders[2]] = last
        for place, other in zip(orders[:2], others, strict=True):
            cases[place] = other
        ends.append(draw(cases, steps=3, batch_size=1, rng=rng)[-1])
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


def test_each_case_comes_once_before_any_comes_again() -> None:
    cases = [make_case(seed=seed) for seed in range(5)]
    drawn = draw(cases, steps=10, batch_size=2, augmentation="none", patch_size=(24, 20, 18))
    order = [round(float(image.min()) * 1000 + 1000) for batch, _ in drawn for image in batch]
    cycles = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(cycle) == [0, 1, 2, 3, 4] for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1


def test_memory_mapped_case_is_not_changed(tmp_path: Any) -> None:
    case = make_case()
    np.save(tmp_path / "image.npy", case.image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r", allow_pickle=False)
    case = CachedCase(**{**vars(case), "image": mapped})
    draw([case])
    assert np.array_equal(np.load(tmp_path / "image.npy", allow_pickle=False), make_case().image)


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from fedseg.data.cache import CachedCase
from fedseg.data.patches import batches
from fedseg.data.preprocess import Placement

def mapped(path, dtype):
    return np.lib.format.open_memmap(path, "w+", dtype, (160, 160, 160))

def resident():
    # Pages of mapped files: the heap's own size varies by more, whatever the number of cases.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssFile:")[2].split()[0]) / 1024

def case(number):
    folder = Path(sys.argv[1])
    image, labels = (mapped(folder / f"{number}-{name}.npy", kind)
                     for name, kind in (("image", "f2"), ("labels", "u1")))
    return CachedCase(image=image, labels=labels, truth=labels, placement=None,
                      foreground={"liver": np.arange(9), "tumor": np.arange(0)})

cases = [case(number) for number in range(int(sys.argv[2]))]
draw = batches(cases, steps=60, batch_size=2, patch_size=(96, 96, 96), foreground=0,
               augmentation="none", rng=np.random.default_rng(0))
for _ in draw:
    pass
print(resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_resident_memory_does_not_grow_with_the_cases(tmp_path: Path) -> None:
    """20 cases of 12 MB against 2: +216 MB on disk, next to nothing in memory."""

    def resident(cases: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(cases)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert resident(20) - resident(2) < 40
