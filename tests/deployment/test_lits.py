"""The LiTS benchmark on a folder of LiTS's shape: phantoms of a tenth of the voxels."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from processes import CHECKOUT, Workplace

from fedseg.data.phantom import KINDS, make_phantom
from fedseg.data.sites import find_cases, site_cases
from fedseg.data.volumes import read_mask
from fedseg.site_config import load_site_config

SCRIPT = CHECKOUT / "benchmarks" / "lits.py"
CASES = 11
TINY = (
    'model.width=2 model.depth=2 train.patch-size="16,16,16" train.spacing="8,8,8" '
    'train.precision="fp32" train.batch-size=1'
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT.is_file(), reason="no benchmarks in an sdist"),
]


@pytest.fixture(scope="module")
def lits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lits")
    kind = replace(KINDS["portal"], spacing=(8.0, 8.0, 8.0), tumor_count=(1, 3))
    for number in range(CASES):
        phantom = make_phantom(kind, number)
        for name, array in (("volume", phantom.image), ("segmentation", phantom.mask)):
            nib.save(nib.Nifti1Image(array, phantom.affine), folder / f"{name}-{number}.nii")
    return folder


def test_federation_over_four_sites_half_of_them_liver_only(
    lits: Path, workplace: Workplace
) -> None:
    out = workplace.root / "lits-run"
    done = subprocess.run(
        [sys.executable, SCRIPT, lits, "--out", out, "--rounds", "1", "--steps", "1", "-c", TINY],
        capture_output=True,
        text=True,
        check=False,
        cwd=workplace.root,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("| liver |", "| 0.9556 |", "| 0.6822 |", "lesions", "Not all of LiTS"):
        assert words in done.stdout
    seen = []
    for index in range(4):
        folder = out / "sites" / f"site-{index}"
        listing, config = site_cases(folder, load_site_config({}, folder=folder))
        assert config.labels == (("liver", "tumor"), ("liver",))[index % 2]
        assert all(case.image.is_symlink() and case.mask.is_symlink() for case in listing.cases)
        values = set()
        for case in listing.cases:
            mask = read_mask(case.mask, label_map=config.label_map)
            values |= set(np.unique(mask.array).tolist())
        assert values == ({0, 1, 2}, {0, 1})[index % 2]
        seen += [case.image.resolve() for case in listing.cases]
    seen += [case.image.resolve() for case in find_cases(out / "held-out").cases]
    assert sorted(seen) == sorted(lits.resolve().glob("volume-*.nii"))
    (line,) = (out / "runs" / "latest" / "history.jsonl").read_text().splitlines()[1:]
    sites = json.loads(line)["sites"]
    assert list(sites) == [f"site-{index}" for index in range(4)]
    assert {site["status"] for site in sites.values()} == {"ok"}
