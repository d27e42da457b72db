"""Tests of model files."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.errors import ModelError
from fedseg.segmentation.model_file import (
    BEST,
    find_model,
    load_model,
    read_model_file,
    save_model,
    sha256_of,
)
from fedseg.segmentation.models import MODELS, build_model


def a_plan(name: str = "unet", **changes: Any) -> Plan:
    depth = 5 if name == "unet++" else 2
    plan = make_plan(StudyConfig())
    return plan.model_copy(update={"model": name, "width": 2, "depth": depth, **changes})


def write(path: Path, plan: Plan | None = None) -> Path:
    plan = plan or a_plan()
    save_model(path, build_model(plan, seed=0).state_dict(), plan, round="3")
    return path


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_needs_no_other_file(tmp_path: Path, name: str) -> None:
    plan = a_plan(name, spacing=(1.0, 2.0, 3.5), ct_window=(-100.0, 300.0))
    network = build_model(plan, seed=0)
    path = tmp_path / "model.safetensors"
    save_model(path, network.state_dict(), plan, round="3", study_run="x")
    loaded, loaded_plan = load_model(path)
    assert loaded_plan == plan
    assert list(loaded.state_dict()) == list(network.state_dict())
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    _, _, metadata = read_model_file(path)
    assert (metadata["round"], metadata["study_run"]) == ("3", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_any_safetensors_reader_sees_the_plan(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    with safe_open(path, framework="numpy") as file:
        assert Plan.from_json(file.metadata()["plan"]) == a_plan()


def test_weights_in_another_memory_layout_are_written_alike(tmp_path: Path) -> None:
    plan = a_plan()
    network = build_model(plan, seed=0)
    save_model(tmp_path / "a.safetensors", network.state_dict(), plan)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    save_model(tmp_path / "b.safetensors", network.state_dict(), plan)
    first, second = (read_model_file(tmp_path / f"{name}.safetensors")[0] for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_write_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write(path, a_plan(width=4))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _foreign(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path, metadata={"format": "pt"})


def _without_metadata(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path)


def _without_plan(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path, metadata={"format": "fedseg-model-1"})


def _bad_plan(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path, metadata={"format": "fedseg-model-1", "plan": "{}"})


def _pickle(path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, "no such file"),
        (_folder, "no such file"),
        (_truncate, "not a readable .safetensors file"),
        (lambda path: path.write_bytes(b""), "not a readable .safetensors file"),
        (_pickle, "not a readable .safetensors file"),
        (_foreign, "not written by fedseg, it has no plan in its metadata"),
        (_without_metadata, "not written by fedseg, it has no plan in its metadata"),
        (_without_plan, "its plan can't be read"),
        (_bad_plan, "its plan can't be read"),
    ],
)
def test_bad_file_is_one_error_with_a_mend(tmp_path: Path, spoil: Any, words: str) -> None:
    path = write(tmp_path / "model.safetensors")
    spoil(path)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; give a model-best.safetensors of a run")
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, build_model(a_plan()).state_dict(), a_plan(width=4))
    with pytest.raises(ModelError, match="its weights don't fit the network 'unet'"):
        load_model(path)


def test_network_of_a_package_that_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    state, _, _ = read_model_file(path)
    save_model(path, state, a_plan("no_such_package_here:network"))
    with pytest.raises(ModelError, match="needs package no_such_package_here; install it"):
        load_model(path, allow_custom_code=True)


def test_a_model_file_cannot_choose_what_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    state, _, _ = read_model_file(path)
    save_model(path, state, a_plan("os:system"))
    with pytest.raises(ModelError, match=r"code from outside fedseg \('os:system'\)"):
        load_model(path)


def test_a_run_is_found_by_folder_and_by_id(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "2026-01-01"
    folder.mkdir(parents=True)
    best = write(folder / BEST)
    assert find_model(folder) == find_model("2026-01-01", runs=tmp_path / "runs") == best
    assert find_model(best) == best
    assert find_model("nowhere", runs=tmp_path / "runs") == Path("nowhere")
    network, plan = load_model(folder)
    assert plan == a_plan() and set(network.state_dict()) == set(read_model_file(best)[0])


def test_demo_is_small_and_says_what_it_is() -> None:
    path = find_model("demo")
    assert path.stat().st_size < 3_000_000
    state, plan, metadata = read_model_file(Path("demo"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert (plan.model, [plan.width * 2**n for n in range(plan.depth)]) == (
        "unet",
        [8, 16, 32, 64, 128],
    )
    assert metadata["data"] == "phantoms"
    card = path.with_name("demo.md").read_text()
    assert "no clinical value" in card and sha256_of(path) in card
    network, _ = load_model(Path("demo"))
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_demo_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"^demo: its package fedseg_weights isn't installed"):
        load_model(Path("demo"))
