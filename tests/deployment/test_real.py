"""Real scans of three hospitals: a deployment, then a full-size CT through `fedseg predict`."""

import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from processes import BIN, CHECKOUT, Run, Workplace

from fedseg.data.tumors import implant_tumors

pytestmark = pytest.mark.slow

REAL = Path(os.environ.get("FEDSEG_REAL_DATA") or CHECKOUT.parent / "shared" / "data" / "real")
SITES = {
    "aachen": ("site-ct-a", "ct", "liver,tumor"),
    "basel": ("site-ct-b", "ct", "liver,tumor"),
    "chur": ("site-mr", "mr", "liver"),
}
STUDY = {
    "model.width": 8,
    "model.depth": 4,
    "train.patch-size": "64,64,16",
    "train.spacing": "3,3,3",
    "train.steps-per-epoch": 4,
    "train.validation-fraction": 0.5,
    "federation.rounds": 2,
    "federation.min-sites": 3,
}
MOST_BYTES = 3_000_000_000

if not REAL.is_dir():
    pytest.skip(f"no real scans in {REAL}; set FEDSEG_REAL_DATA", allow_module_level=True)


def with_tumors(image_path: Path, mask_path: Path, seed: int) -> None:
    """Implant tumours into a CT's liver, in place and on the same grid."""
    scan, mask = nib.load(image_path), nib.load(mask_path)
    to_ras = ornt_transform(io_orientation(scan.affine), axcodes2ornt("RAS"))
    ras = scan.as_reoriented(to_ras)
    liver = np.asarray(mask.as_reoriented(to_ras).dataobj) == 1
    image, labels = implant_tumors(
        np.rint(ras.get_fdata()).astype(np.int16),
        liver,
        np.random.default_rng(seed),
        spacing=[float(size) for size in ras.header.get_zooms()],
        count=3,
        radii_mm=(8.0, 16.0),
    )
    assert (labels == 2).any()
    back = ornt_transform(axcodes2ornt("RAS"), io_orientation(scan.affine))
    for path, array in ((image_path, image), (mask_path, labels)):
        stored = nib.Nifti1Image(array, ras.affine).as_reoriented(back)
        assert stored.shape == scan.shape
        assert np.allclose(stored.affine, scan.affine)
        path.unlink()
        nib.save(nib.Nifti1Image(stored.dataobj, scan.affine), path)


@pytest.fixture(scope="module")
def hospitals(workplace: Workplace) -> dict[str, Path]:
    """Each site's folder with two cases: its scan, once more with other tumours."""
    folders = {}
    for number, (name, (source, modality, labels)) in enumerate(SITES.items()):
        folder = workplace.root / name
        for case in range(2):
            for kind in ("images", "masks"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                (found,) = (REAL / source / kind).glob("*.nii.gz")
                shutil.copyfile(found, folder / kind / f"case-{case}.nii.gz")
            if "tumor" in labels:
                paths = (folder / kind / f"case-{case}.nii.gz" for kind in ("images", "masks"))
                with_tumors(*paths, seed=10 * number + case)
        settings = {"name": name, "modality": modality, "labels": labels}
        lines = [f'{key} = "{value}"\n' for key, value in settings.items()]
        (folder / "site.toml").write_text("".join(lines))
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def run(workplace: Workplace, hospitals: dict[str, Path]) -> Run:
    workplace.superlink()
    workplace.connection("insecure = true")
    for name, folder in hospitals.items():
        config = {"data-dir": str(folder), "device": "cpu", "threads": 1}
        workplace.supernode(name, config)
    return workplace.deploy(STUDY)


def test_folders_are_usable(workplace: Workplace, hospitals: dict[str, Path]) -> None:
    """The MR site holds its one scan twice, and the check is right to say so."""
    for name, folder in hospitals.items():
        twice = name == "chur"
        said = workplace.call("fedseg", "check", folder, expect=int(twice), seconds=60)
        assert "2 of 2 cases usable" in said
        assert said.count("warning: ") == twice
        assert ("duplicate image" in said) == twice


def test_three_hospitals_train(run: Run) -> None:
    assert run.status == "finished:completed"
    history = run.history()
    assert [line["round"] for line in history] == [0, 1, 2]
    for line in history[1:]:
        assert list(line["sites"]) == list(SITES)
        for name, site in line["sites"].items():
            assert site["status"] == "ok"
            assert site["training"]["skipped"] == 0
            metrics = site["metrics"]
            assert metrics["cases"] == 1
            assert 0 <= metrics["liver.dice"] <= 1
            if name == "chur":  # annotates no tumours, so nothing is said about them
                assert metrics["tumor.dice"] is None
                assert metrics["tumor.dice.cases"] == 0
            else:
                assert 0 <= metrics["tumor.dice"] <= 1
        assert line["federated"]["liver.dice.cases"] == 3
        assert line["federated"]["tumor.dice.cases"] == 2


def test_predict_a_whole_ct(workplace: Workplace, run: Run, tmp_path: Path) -> None:
    assert run.folder is not None
    (scan,) = (REAL / "site-ct-a" / "images").glob("*.nii.gz")
    model = run.folder / "model-best.safetensors"
    command = [BIN / "fedseg", "predict", scan, "--model", model, "-o", tmp_path, "--device", "cpu"]
    # A process of its own, so that the peak is that of this child and of no other.
    watch = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    output = workplace.call(sys.executable, "-c", watch, *command, seconds=200)
    assert " mL" in output
    given, mask = nib.load(scan), nib.load(tmp_path / scan.name)
    assert mask.shape == given.shape == (512, 512, 78)
    assert np.array_equal(mask.affine, given.affine)
    assert mask.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}
    assert (mask.header.get_slope_inter()) in ((None, None), (1.0, 0.0))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = int(output.rsplit("peak ", 1)[1]) * unit
    print(f"peak memory of predict: {peak / 1e9:.2f} GB")
    assert peak < MOST_BYTES
