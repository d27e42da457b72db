"""Tests of the phantoms."""

import gzip
import os
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from fedseg.data import phantom
from fedseg.data.phantom import KINDS, UNSEEN, Phantom, make_phantom, write_phantom_site

EVERY_KIND = {**KINDS, UNSEEN.name: UNSEEN}


@lru_cache
def case(name: str, seed: int = 5) -> Phantom:
    return make_phantom(EVERY_KIND[name], seed)


def parenchyma(made: Phantom) -> np.ndarray:
    liver = ndimage.binary_erosion(made.mask == 1, iterations=2)
    return liver & ~ndimage.binary_dilation(made.mask == 2, iterations=3)


def test_kinds_are_named_and_unseen_is_new() -> None:
    assert list(KINDS) == ["portal", "arterial", "native", "low-dose", "thick-slice"]
    assert all(name == kind.name for name, kind in KINDS.items())
    assert UNSEEN.name not in KINDS


def test_same_seed_same_case_and_other_seed_other_patient() -> None:
    first, again, other = case("portal"), make_phantom(KINDS["portal"], 5), case("portal", 6)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    livers = first.mask > 0, other.mask > 0
    overlap = 2 * (livers[0] & livers[1]).sum() / (livers[0].sum() + livers[1].sum())
    assert 0.5 < overlap < 0.96


@pytest.mark.parametrize("name", EVERY_KIND)
def test_case_is_well_formed(name: str) -> None:
    made, kind = case(name), EVERY_KIND[name]
    assert made.image.dtype == np.int16
    assert made.mask.dtype == np.uint8
    assert made.affine.dtype == np.float64
    assert made.image.shape == made.mask.shape
    assert 0.5e6 < made.image.size < 1.2e6
    assert set(np.unique(made.mask)) <= {0, 1, 2}
    assert "".join(nib.aff2axcodes(made.affine)) == kind.orientation
    assert np.allclose(np.abs(np.diag(made.affine)[:3]), kind.spacing)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_liver_is_whole_of_human_size_and_on_the_right(name: str) -> None:
    made = case(name)
    liver = made.mask > 0
    assert 1000 < liver.sum() * abs(np.linalg.det(made.affine)) / 1000 < 2000
    assert ndimage.label(liver)[1] == 1
    for axis in range(3):
        ends = np.take(liver, [0, -1], axis=axis)
        assert not ends.any()
    body = np.argwhere(made.image > -200).mean(axis=0)
    offset = made.affine[:3, :3] @ (np.argwhere(liver).mean(axis=0) - body)
    assert offset[0] > 15


@pytest.mark.parametrize("name", EVERY_KIND)
def test_hounsfield_units_and_noise_are_the_kinds(name: str) -> None:
    made, kind = case(name), EVERY_KIND[name]
    liver = parenchyma(made)
    values = made.image[liver].astype(float)
    assert abs(values.mean() - kind.liver_hu) < 25
    assert abs(values.std() - kind.noise_sd) < 6
    residual = np.where(liver, made.image - values.mean(), 0)
    for axis, expected in enumerate((0.5, 0.5, 0.24)):
        pairs = np.delete(liver, 0, axis) & np.delete(liver, -1, axis)
        products = np.delete(residual, 0, axis) * np.delete(residual, -1, axis)
        correlation = products[pairs].mean() / values.var()
        assert abs(correlation - expected) < (0.16 if axis < 2 else 0.09)


def test_tumor_at_one_site_looks_like_liver_at_another() -> None:
    portal, native = case("portal"), case("native")
    tumor = portal.image[ndimage.binary_erosion(portal.mask == 2, iterations=2)].mean()
    assert abs(tumor - native.image[parenchyma(native)].mean()) < 25
    assert tumor < portal.image[parenchyma(portal)].mean() - 40


def test_site_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantom, "make_phantom", lambda kind, seed: case(kind.name, seed))
    write_phantom_site(tmp_path, KINDS["arterial"], [5], name="aachen")
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["images/case-0005.nii.gz", "masks/case-0005.nii.gz", "site.toml"]
    made = case("arterial")
    for folder, array in (("images", made.image), ("masks", made.mask)):
        stored = nib.load(tmp_path / folder / "case-0005.nii.gz")
        assert np.array_equal(np.asanyarray(stored.dataobj), array)
        assert stored.get_data_dtype() == array.dtype
        assert np.allclose(stored.affine, made.affine)
    assert (tmp_path / "site.toml").read_text() == (
        'name = "aachen"\nlayout = "images-masks"\nmodality = "ct"\nlabels = "liver,tumor"\n'
        "\n[policy]\nmin-count = 1  # nobody to protect in a phantom\n"
    )


def test_complete_cases_are_kept_and_torn_ones_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phantom, "make_phantom", lambda kind, seed: case("portal"))
    write_phantom_site(tmp_path, KINDS["portal"], [1, 2], name="bonn")
    kept, torn = (tmp_path / "images" / f"case-000{seed}.nii.gz" for seed in (1, 2))
    kept.write_bytes(b"kept")
    (tmp_path / "masks" / torn.name).unlink()
    torn.write_bytes(b"torn")
    write_phantom_site(tmp_path, KINDS["portal"], [1, 2], name="bonn")
    assert kept.read_bytes() == b"kept"
    assert gzip.decompress(torn.read_bytes())[:4] == (348).to_bytes(4, "little")


def test_interrupted_write_leaves_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError

    monkeypatch.setattr(phantom, "make_phantom", lambda kind, seed: case("portal"))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_phantom_site(tmp_path, KINDS["portal"], [1], name="bonn")
    assert not list(tmp_path.rglob("*.nii.gz"))
