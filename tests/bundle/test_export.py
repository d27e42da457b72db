"""The bundle as files, and as others run it: without FedSeg."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
from monai.networks.nets import UNet
from small_model import plan_of, write_model

from fedseg.bundle.export import export_bundle
from fedseg.bundle.facts import UNTOLD
from fedseg.commands.predict import predict
from fedseg.data.phantom import KINDS, write_phantom_site
from fedseg.errors import DataError, ModelError
from fedseg.segmentation import training
from fedseg.segmentation.model_file import load_model
from fedseg.segmentation.models import MODELS

FILES = {
    *("LICENSE", "requirements.txt", "docs/README.md"),
    *("configs/inference.json", "configs/metadata.json", "configs/meta_schema.json"),
    *("models/model.pt", "models/model.ts"),
}

# Run first in a process: what FedSeg alone brings can't be imported there.
BLOCKED = """
import runpy, sys
class Nothing:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("fedseg", "fedseg_weights", "flwr", "pydantic", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
sys.argv = ["monai.bundle", *sys.argv[1:]]
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


def monai_bundle(bundle: Path, *words: object) -> str:
    """Run `python -m monai.bundle` in the bundle's folder, FedSeg blocked."""
    pytest.importorskip("fire")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCKED, *map(str, words)]
    done = subprocess.run(command, cwd=bundle, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def files(bundle: Path) -> set[str]:
    return {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}


def test_bundle_has_the_files_of_the_specification(bundle: Path) -> None:
    found = files(bundle)
    assert found >= FILES
    assert all(name.startswith("scripts/") for name in found - FILES)
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []


def test_network_is_monais_own_class_with_the_trained_weights(bundle: Path) -> None:
    config = json.loads((bundle / "configs" / "inference.json").read_text())["network_def"]
    assert config.pop("_target_") == "UNet"
    network = UNet(**config)
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    network.load_state_dict(state)
    ours, _ = load_model(bundle.parent / "m.safetensors")
    image = torch.randn(1, 1, 16, 24, 32)
    with torch.inference_mode():
        assert torch.equal(network.eval()(image), ours.eval()(image))


def test_hashes_in_the_card_are_those_of_the_files(bundle: Path) -> None:
    card = (bundle / "docs" / "README.md").read_text()
    found = dict(re.findall(r"^\| `(models/[\w.]+)` \|.*\| `([0-9a-f]{64})` \|$", card, re.M))
    assert set(found) == {"models/model.pt", "models/model.ts"}
    for name, digest in found.items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "unet++" else ())
        for name in sorted(set(MODELS) - {"unet"})
    ],
)
def test_other_networks_come_out_of_their_own_code(tmp_path: Path, name: str) -> None:
    plan = plan_of(name)
    model = write_model(tmp_path / "m.safetensors", plan)
    out = export_bundle(model, tmp_path / "b")
    code = (
        "import json, torch\n"
        "from scripts.transforms import network_of\n"
        "config = json.load(open('configs/inference.json'))\n"
        "assert config['network_def']['_target_'] == 'scripts.transforms.network_of'\n"
        "network = network_of(config['plan'])\n"
        "network.load_state_dict(torch.load('models/model.pt', weights_only=True))\n"
        "torch.manual_seed(0)\n"
        "print(float(network.eval()(torch.randn(1, 1, 32, 32, 32)).double().abs().sum()))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED.partition("sys.argv")[0] + code],
        cwd=out,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    network, _ = load_model(model)
    torch.manual_seed(0)
    with torch.inference_mode():
        expected = float(network.eval()(torch.randn(1, 1, 32, 32, 32)).double().abs().sum())
    assert float(ran.stdout) == pytest.approx(expected, rel=1e-5)


def test_metadata_passes_monais_check_without_network(bundle: Path) -> None:
    out = monai_bundle(
        bundle,
        "verify_metadata",
        *("--meta_file", "configs/metadata.json", "--filepath", "configs/meta_schema.json"),
    )
    assert "metadata is verified with no error" in out


def _turned(scan: Path, out: Path, axes: str) -> None:
    """Store a scan in another axis order, as scanners do."""
    image = nib.load(scan)
    wanted = nib.orientations.axcodes2ornt(tuple(axes))
    now = nib.orientations.io_orientation(image.affine)
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(now, wanted)), out)


@pytest.mark.slow
def test_bundle_predicts_what_fedseg_predicts(tmp_path: Path) -> None:
    """On a phantom, stored in four axis orders, with the demo model: both regions are there."""
    write_phantom_site(tmp_path / "site", KINDS["portal"], [7], name="p")
    (phantom,) = (tmp_path / "site" / "images").iterdir()
    scans = tmp_path / "scans"
    scans.mkdir()
    for axes in ("RAS", "LPS", "PIR", "SAL"):
        _turned(phantom, scans / f"{axes}.nii.gz", axes)
    bundle = export_bundle("demo", tmp_path / "bundle")
    monai_bundle(
        bundle,
        *("run", "--config_file", "configs/inference.json"),
        *("--dataset_dir", scans, "--output_dir", tmp_path / "theirs"),
    )
    with pytest.raises(typer.Exit) as done:
        predict([scans], Path("demo"), tmp_path / "ours", device="cpu")
    assert done.value.exit_code == 0
    for axes in ("RAS", "LPS", "PIR", "SAL"):
        ours = nib.load(tmp_path / "ours" / f"{axes}.nii.gz")
        theirs = nib.load(tmp_path / "theirs" / f"{axes}_seg.nii.gz")
        assert theirs.get_data_dtype() == np.uint8
        assert np.allclose(ours.affine, theirs.affine, atol=1e-4)
        one, other = np.asarray(ours.dataobj), np.asarray(theirs.dataobj)
        assert one.shape == other.shape
        for lowest in (1, 2):
            a, b = one >= lowest, other >= lowest
            assert min(a.sum(), b.sum()) > 50
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= 0.999


def test_choice_of_number_format_is_fedsegs(bundle: Path) -> None:
    code = (
        "import torch\nfrom scripts.training import choose_dtype\n"
        "print([str(choose_dtype(p, torch.device('cpu'))) for p in ('auto', 'fp32', 'bf16')])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True, check=True
    )
    cpu = torch.device("cpu")
    assert ran.stdout.strip() == str(
        [str(training.choose_dtype(p, cpu)) for p in ("auto", "fp32", "bf16")]
    )


class TestWhatIsRefused:
    def test_folder_that_exists(self, bundle: Path) -> None:
        before = (bundle / "docs" / "README.md").read_text()
        with pytest.raises(DataError, match=r"liver: exists; .*--overwrite"):
            export_bundle(bundle.parent / "m.safetensors", bundle)
        assert (bundle / "docs" / "README.md").read_text() == before

    def test_overwrite_replaces_a_bundle_and_nothing_else(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m.safetensors", plan_of())
        (tmp_path / "papers").mkdir()
        (tmp_path / "papers" / "thesis.tex").touch()
        with pytest.raises(DataError, match="is no bundle; give another folder"):
            export_bundle(model, tmp_path / "papers", overwrite=True)
        assert (tmp_path / "papers" / "thesis.tex").exists()
        out = export_bundle(model, tmp_path / "b")
        (out / "old").touch()
        export_bundle(model, out, overwrite=True)
        assert not (out / "old").exists() and files(out) >= FILES

    def test_network_from_outside(self, tmp_path: Path) -> None:
        plan = plan_of()
        write_model(tmp_path / "m.safetensors", plan)
        network, _ = load_model(tmp_path / "m.safetensors")
        from fedseg.segmentation.model_file import save_model

        custom = plan.model_copy(update={"model": "mynet.nets:tiny"})
        save_model(tmp_path / "c.safetensors", network.state_dict(), custom)
        with pytest.raises(ModelError, match=r"code from outside fedseg \('mynet.nets:tiny'\)"):
            export_bundle(tmp_path / "c.safetensors", tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_model_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no such file"):
            export_bundle("2026-01-01-no-run", tmp_path / "b")
        assert list(tmp_path.iterdir()) == []

    def test_failure_on_the_way_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = write_model(tmp_path / "m.safetensors", plan_of())

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(DataError, match="No space left on device"):
            export_bundle(model, tmp_path / "b")
        assert list(tmp_path.iterdir()) == [model]


def test_folder_of_a_run_gives_its_best_model_and_its_card(
    run_study: Any, make_site: Any, tmp_path: Path
) -> None:
    sites = {n: {"data-dir": str(make_site(f"s{n}", seed=n))} for n in (1, 2)}
    folder, _ = run_study(sites, {"federation.rounds": 1, "train.patch-size": "16,16,16"})
    out = export_bundle(folder.path, tmp_path / "b", license="CC BY 4.0")
    assert export_bundle(str(folder.path / "model-best.safetensors"), tmp_path / "c")
    card = (out / "docs" / "README.md").read_text()
    assert f"- run: {folder.run_id}" in card
    assert re.search(r"\n\d cases at 2 sites \(\d, \d\), over 1 rounds", card)
    assert "Weights: CC BY 4.0." in card
    assert "| cases held out at the sites | liver | dice |" in card
    assert "No differential privacy was used" in card
    metadata = json.loads((out / "configs" / "metadata.json").read_text())
    assert any(key.startswith("federated.liver.dice") for key in metadata["eval_metrics"])
    assert str(tmp_path) not in card + json.dumps(metadata)


@pytest.mark.parametrize("text", ['{"architectures": ["UNet"]}', "[" * 9999, "{", "\xff"])
def test_config_json_of_something_else_makes_no_run(tmp_path: Path, text: str) -> None:
    """So does a folder of Hugging Face look; nothing is known of the model's privacy."""
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    model = write_model(tmp_path / "model.safetensors", plan_of())
    card = (export_bundle(model, tmp_path / "b") / "docs" / "README.md").read_text()
    assert card.count(UNTOLD) == 3 and "No differential privacy" not in card


needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="fedseg[onnx] isn't installed",
)


@needs_onnx
@pytest.mark.slow
def test_onnx_gives_the_logits_of_model_pt(tmp_path: Path) -> None:
    import onnxruntime

    model = write_model(tmp_path / "m.safetensors", plan_of())
    out = export_bundle(model, tmp_path / "b", onnx=True)
    network, _ = load_model(model)
    session = onnxruntime.InferenceSession(
        out / "models" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for shape in ((1, 1, 32, 32, 32), (3, 1, 64, 32, 48)):
        image = torch.randn(shape)
        with torch.inference_mode():
            expected = network.eval()(image).numpy()
        (found,) = session.run(None, {"image": image.numpy()})
        assert np.allclose(found, expected, atol=1e-3)
    assert "models/model.onnx" in (out / "docs" / "README.md").read_text()


def test_onnx_without_its_packages_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m.safetensors", plan_of())
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "onnx" in name else real(name, *a)
    )
    with pytest.raises(ModelError, match=r"pip install 'fedseg\[onnx\]'"):
        export_bundle(model, tmp_path / "b", onnx=True)
    assert not (tmp_path / "b").exists()
