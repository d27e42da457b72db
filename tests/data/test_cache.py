"""Tests of the cache: nothing is read twice, keys, two processes, a full disk."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase, cache_bytes, cached_case
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.data.preprocess import prepare, prepare_labels
from fedseg.data.sites import Case
from fedseg.data.volumes import read_image, read_mask
from fedseg.errors import CaseError, DataError

PLAN = make_plan(StudyConfig()).model_copy(update={"patch_size": (16, 16, 16)})
SHAPE = (30, 24, 20)


def write(folder: Path, seed: int = 0, *, shape: tuple[int, int, int] = SHAPE) -> Case:
    rng = np.random.default_rng(seed)
    image = rng.normal(50, 30, shape)
    image[:2], image[-2:] = -1000, -1000
    labels = np.zeros(shape, np.uint8)
    labels[5:20, 5:15, 5:15] = 1
    labels[8:12, 8:12, 8:12] = 2
    case = Case(image=folder / "image.nii", mask=folder / "mask.nii")
    for path, array in ((case.image, image.astype(np.int16)), (case.mask, labels)):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 3, 4, 1])), path)
    return case


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "cases").glob("*/*"))


def same(a: CachedCase, b: CachedCase) -> bool:
    arrays = [(a.image, b.image), (a.labels, b.labels), (a.truth, b.truth)]
    arrays += [(a.foreground[name], b.foreground[name]) for name in ("liver", "tumor")]
    return a.placement == b.placement and all(np.array_equal(x, y) for x, y in arrays)


def test_entry_holds_what_preprocessing_gives(tmp_path: Path) -> None:
    case = write(tmp_path)
    cached = cached_case(case, PLAN, tmp_path / "cache")
    scan = read_image(case.image)
    mask = read_mask(case.mask, image=scan)
    prepared = prepare(scan, PLAN)
    labels = prepare_labels(mask.array, prepared)
    assert cached.image.dtype == np.float16
    assert np.array_equal(cached.image, prepared.image.astype(np.float16))
    assert np.array_equal(cached.labels, labels)
    assert np.array_equal(cached.truth, mask.array)
    assert cached.placement == prepared.placement
    for name, lowest in (("liver", 1), ("tumor", 2)):
        assert np.array_equal(cached.foreground[name], np.flatnonzero(labels >= lowest))
        assert cached.foreground[name].size > 0
    assert isinstance(cached.image, np.memmap)


def test_many_foreground_voxels_are_sampled_and_spread(tmp_path: Path) -> None:
    case = write(tmp_path, shape=(60, 60, 60))
    labels = np.ones((60, 60, 60), np.uint8)
    nib.save(nib.Nifti1Image(labels, np.diag([2.0, 3, 4, 1])), case.mask)
    plan = PLAN.model_copy(update={"spacing": (2.0, 3.0, 4.0)})
    cached = cached_case(case, plan, tmp_path / "cache")
    liver = cached.foreground["liver"]
    assert liver.size == 20_000 == np.unique(liver).size
    assert abs(liver.mean() / cached.labels.size - 0.5) < 0.01
    assert np.all(cached.labels.ravel()[liver] == 1)


def test_second_call_opens_no_nifti(tmp_path: Path) -> None:
    case = write(tmp_path)
    first = cached_case(case, PLAN, tmp_path / "cache")
    for path in (case.image, case.mask):
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert same(cached_case(case, PLAN, tmp_path / "cache"), first)
    assert len(entries(tmp_path / "cache")) == 1


def test_whatever_changes_the_result_makes_a_new_entry(tmp_path: Path) -> None:
    case, cache = write(tmp_path), tmp_path / "cache"
    seen: set[Path] = set()

    def made_anew(plan: Plan = PLAN, **options: Any) -> bool:
        cached_case(case, plan, cache, **options)
        new = set(entries(cache)) - seen
        seen.update(new)
        return bool(new)

    assert made_anew()
    assert not made_anew()
    for change in (
        {"spacing": (2.5, 3.0, 3.0)},
        {"ct_window": (-100.0, 200.0)},
        {"mr_percentiles": (2.0, 98.0)},
        {"patch_size": (20, 16, 16)},
    ):
        assert made_anew(PLAN.model_copy(update=change))
    assert made_anew(modality="mr")
    assert made_anew(label_map={1: 1, 2: 1})
    for path in (case.image, case.mask):
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
        assert made_anew()
    # What a network is like changes nothing about its input.
    assert not made_anew(PLAN.model_copy(update={"width": 4, "model": "unet++", "batch_size": 9}))


def test_the_two_plans_used_last_are_kept(tmp_path: Path) -> None:
    case, cache = write(tmp_path), tmp_path / "cache"
    plans = [PLAN.model_copy(update={"spacing": (mm, 3.0, 3.0)}) for mm in (2.0, 2.5, 3.5)]
    first = cached_case(case, plans[0], cache)
    (oldest,) = entries(cache)
    cached_case(case, plans[1], cache)
    (second,) = set(entries(cache)) - {oldest}
    os.utime(second, (1, 1))  # the first was used after it
    before = np.array(first.image)
    cached_case(case, plans[2], cache)
    kept = entries(cache)
    assert len(kept) == 2 and oldest in kept and second not in kept
    assert np.array_equal(first.image, before)
    assert cache_bytes(cache) == sum(p.stat().st_size for e in kept for p in e.iterdir())


def test_exported_again_is_read_again(tmp_path: Path) -> None:
    case = write(tmp_path)
    first = cached_case(case, PLAN, tmp_path / "cache")
    before = np.array(first.image)
    write(tmp_path, seed=1)
    assert not np.array_equal(cached_case(case, PLAN, tmp_path / "cache").image, before)


@pytest.mark.parametrize("damage", ["emptied", "cut", "gone", "no JSON"])
def test_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    case, cache = write(tmp_path), tmp_path / "cache"
    cached_case(case, PLAN, cache)
    (folder,) = entries(cache)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    if damage == "emptied":
        (folder / "image.npy").write_bytes(b"")
    elif damage == "cut":
        (folder / "labels.npy").write_bytes(before["labels.npy"][:500])
    elif damage == "gone":
        (folder / "tumor.npy").unlink()
    else:
        (folder / "placement.json").write_text("{")
    cached_case(case, PLAN, cache)
    assert entries(cache) == [folder]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_bad_case_leaves_nothing_behind(tmp_path: Path) -> None:
    case = write(tmp_path)
    case.mask.unlink()
    with pytest.raises(CaseError, match="no such file; correct the path"):
        cached_case(case, PLAN, tmp_path / "cache")
    write(tmp_path, shape=(6, 24, 20))
    with pytest.raises(CaseError, match="smaller than half the patch"):
        cached_case(case, PLAN, tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or entries(tmp_path / "cache") == []


def _make(folder: str, start: "multiprocessing.synchronize.Barrier") -> None:  # type: ignore[name-defined]
    case = Case(image=Path(folder) / "image.nii", mask=Path(folder) / "mask.nii")
    start.wait(60)
    cached_case(case, PLAN, Path(folder) / "cache")


def test_two_processes_at_once_end_with_one_whole_entry(tmp_path: Path) -> None:
    case = write(tmp_path)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    both = [context.Process(target=_make, args=(str(tmp_path), start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(entries(tmp_path / "cache")) == 1
    alone = cached_case(case, PLAN, tmp_path / "other")
    assert same(cached_case(case, PLAN, tmp_path / "cache"), alone)


def test_two_processes_where_the_other_is_just_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, cache = write(tmp_path), tmp_path / "cache"
    finished = cached_case(case, PLAN, tmp_path / "other")
    rename = os.rename

    def after_the_other(source: Path, target: Path) -> None:
        monkeypatch.undo()
        cached_case(case, PLAN, cache)
        rename(source, target)

    monkeypatch.setattr(os, "rename", after_the_other)
    assert same(cached_case(case, PLAN, cache), finished)
    assert len(entries(cache)) == 1


FULL_DISK = """
import resource, sys
from pathlib import Path
from fedseg.config import StudyConfig
from fedseg.data.cache import cached_case
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.data.sites import Case
from fedseg.errors import DataError
folder = Path(sys.argv[1])
plan = make_plan(StudyConfig()).model_copy(update={"patch_size": (16, 16, 16)})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    cached_case(Case(image=folder / "image.nii", mask=folder / "mask.nii"), plan, folder / "cache")
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 5000])
def test_full_disk_is_one_line_and_leaves_no_torn_entry(tmp_path: Path, limit: int) -> None:
    case = write(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    message = result.stdout.rstrip("\n")
    assert message.startswith(f"{tmp_path / 'cache'}: can't write the cache (")
    assert message.endswith("; free space or set cache-dir")
    assert "None" not in message and "\n" not in message
    assert entries(tmp_path / "cache") == []
    assert cached_case(case, PLAN, tmp_path / "cache").image.size > 0


def test_cache_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"can't write the cache .*free space or set cache-dir"):
        cached_case(write(tmp_path), PLAN, tmp_path / "cache")
