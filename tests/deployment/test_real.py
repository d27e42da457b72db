"""Real scans of three hospitals: a deployment, and its model from the scans to the hand-over."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from processes import BIN, CHECKOUT, Run, Workplace

from fedseg.data.preprocess import prepare, prepare_labels
from fedseg.data.tumors import implant_tumors
from fedseg.data.volumes import read_image, read_mask
from fedseg.segmentation.model_file import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REAL = Path(os.environ.get("FEDSEG_REAL_DATA") or CHECKOUT.parent / "shared" / "data" / "real")
SITES = {
    "aachen": ("site-ct-a", "ct", "liver,tumor"),
    "basel": ("site-ct-b", "ct", "liver,tumor"),
    "chur": ("site-mr", "mr", "liver"),
}
STUDY = {
    "model.init-from": "demo",  # so that few steps give a model that finds both regions
    "model.width": 8,
    "model.depth": 5,
    "train.patch-size": "64,64,32",
    "train.spacing": "3,3,3",
    "train.steps-per-epoch": 4,
    "train.validation-fraction": 0.5,
    "federation.rounds": 2,
    "federation.min-sites": 3,
}
MOST_BYTES = 3_000_000_000
LEFT_OUT = ("fedseg", "flwr", "pydantic", "safetensors")
"""What a bundle has to do without."""

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
    return workplace.deploy(STUDY, seconds=600)


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


@pytest.fixture(scope="module")
def scans(workplace: Workplace, hospitals: dict[str, Path]) -> Path:
    """One scan of each hospital, with its mask, in one folder."""
    folder = workplace.root / "scans"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for name, site in hospitals.items():
            shutil.copyfile(site / kind / "case-0.nii.gz", folder / kind / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def predicted(workplace: Workplace, run: Run, scans: Path) -> Path:
    """The three scans' masks by the run's model, made in bounded memory."""
    assert run.folder is not None
    out = workplace.root / "predicted"
    model = run.folder / "model-best.safetensors"
    command = [BIN / "fedseg", "predict", scans / "images", "--model", model, "-o", out]
    # A process of its own, so that the peak is that of this child and of no other.
    watch = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    command += ["--device", "cpu"]
    output = workplace.call(sys.executable, "-c", watch, *command, seconds=200)
    assert output.count(" mL") >= len(SITES)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = int(output.rsplit("peak ", 1)[1]) * unit
    print(f"peak memory of predict: {peak / 1e9:.2f} GB")
    assert peak < MOST_BYTES
    return out


def test_predicted_masks_lie_on_their_scans(scans: Path, predicted: Path) -> None:
    for name in SITES:
        given = nib.load(scans / "images" / f"{name}.nii.gz")
        mask = nib.load(predicted / f"{name}.nii.gz")
        assert mask.shape == given.shape
        assert np.array_equal(mask.affine, given.affine)
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}
        assert (mask.header.get_slope_inter()) in ((None, None), (1.0, 0.0))
    assert nib.load(predicted / "aachen.nii.gz").shape == (512, 512, 78)


def test_evaluate_and_report(workplace: Workplace, run: Run, scans: Path, predicted: Path) -> None:
    """A model's scores are those of the masks it predicts."""
    assert run.folder is not None
    evaluate = ("fedseg", "evaluate", scans, "--json")
    found = [
        json.loads(said[said.index("{") :])
        for said in (
            workplace.call(*evaluate, "--model", run.folder, "--device", "cpu", seconds=400),
            workplace.call(*evaluate, "--predictions", predicted, seconds=400),
        )
    ]
    assert found[0]["all"] == pytest.approx(found[1]["all"])
    assert found[0]["all"]["cases"] == len(SITES)
    assert found[0]["all"]["liver.dice.pooled"] > 0.5
    (run.folder / "report.html").unlink()
    workplace.call("fedseg", "report", run.folder)
    page = (run.folder / "report.html").read_text()
    assert all(name in page for name in SITES)


def venv_without_fedseg(folder: Path) -> Path:
    """Python of a virtual environment with what is installed here, but for what FedSeg brings.

    Links, for the packages are gigabytes; it reads no .pth file of theirs.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for entry in Path(monai.__file__).parents[1].iterdir():
        if not entry.name.lower().startswith(LEFT_OUT) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def bundle(workplace: Workplace, run: Run) -> Path:
    """The run handed over, as ONNX too."""
    assert run.folder is not None
    out = workplace.root / "bundle"
    workplace.call("fedseg", "export", run.folder, "-o", out, "--onnx", seconds=200)
    return out


def test_bundle_gives_the_same_masks_without_fedseg(
    workplace: Workplace, bundle: Path, scans: Path, predicted: Path
) -> None:
    python = venv_without_fedseg(workplace.root / "bare")
    for name in ("fedseg", "flwr"):
        said = workplace.call(python, "-c", f"import {name}", expect=1)
        assert f"No module named '{name}'" in said
    call = (python, "-m", "monai.bundle")
    said = workplace.call(
        *(*call, "verify_metadata", "--meta_file", "configs/metadata.json"),
        *("--filepath", "configs/meta_schema.json"),
        cwd=bundle,
    )
    assert "metadata is verified with no error" in said
    theirs = workplace.root / "theirs"
    workplace.call(
        *(*call, "run", "--config_file", "configs/inference.json"),
        *("--dataset_dir", scans / "images", "--output_dir", theirs),
        cwd=bundle,
        seconds=200,
    )
    for name in SITES:
        one, other = (
            np.asarray(nib.load(path).dataobj)
            for path in (predicted / f"{name}.nii.gz", theirs / f"{name}_seg.nii.gz")
        )
        for lowest in (1, 2):
            a, b = one >= lowest, other >= lowest
            print(name, lowest, a.sum(), b.sum(), (a != b).sum())
            assert min(a.sum(), b.sum()) > 50
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= 0.999


def test_onnx_gives_the_logits_of_the_trained_model(run: Run, bundle: Path, scans: Path) -> None:
    """On a patch of a real CT that has both regions."""
    assert run.folder is not None
    network, plan = load_model(run.folder / "model-best.safetensors")
    scan = read_image(scans / "images" / "aachen.nii.gz")
    prepared = prepare(scan, plan)
    labels = prepare_labels(
        read_mask(scans / "masks" / "aachen.nii.gz", image=scan).array, prepared
    )
    middle = np.argwhere(labels == 2).mean(0).astype(int)
    patch = tuple(
        slice(start, start + size)
        for wanted, n, centre in zip(plan.patch_size, labels.shape, middle, strict=True)
        for size in (min(wanted, n // 16 * 16),)  # a scan can be thinner than a patch
        for start in (int(np.clip(centre - size // 2, 0, n - size)),)
    )
    image = torch.from_numpy(np.float32(prepared.image[patch]))[None, None]
    with torch.inference_mode():
        expected = network.eval()(image).numpy()
    session = onnxruntime.InferenceSession(
        bundle / "models" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"image": image.numpy()})
    print("logits apart", np.abs(found - expected).max(), "of", np.abs(expected).max())
    assert np.allclose(found, expected, atol=1e-3)
    assert set(np.unique(expected.argmax(1))) == {0, 1, 2}
