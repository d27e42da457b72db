"""The LiTS benchmark on a folder of LiTS's shape: few phantoms."""

import json
import subprocess
import sys

import numpy as np
import pytest
from processes import CHECKOUT, Workplace

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


def test_federation_over_four_sites_half_of_them_liver_only(workplace: Workplace) -> None:
    lits = workplace.root / "lits"
    out = workplace.root / "lits-run"
    command = [sys.executable, SCRIPT, lits, "--out", out, "--phantoms", str(CASES)]
    done = subprocess.run(
        [*command, "--rounds", "1", "--steps", "1", "-c", TINY],
        capture_output=True,
        text=True,
        check=False,
        cwd=workplace.root,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    bar = ("| 0.9556 |", "| 0.6822 |")
    for words in ("not LiTS", "| liver |", *bar, "lesions", "Not all of LiTS"):
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
