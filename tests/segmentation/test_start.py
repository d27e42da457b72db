"""Start from weights that exist: every kind of file, as real files, and hostile ones."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.errors import ModelError
from fedseg.segmentation import start
from fedseg.segmentation.model_file import BEST, save_model
from fedseg.segmentation.models import MODELS, build_model
from fedseg.segmentation.start import fit_weights, read_weights, start_from

State = dict[str, torch.Tensor]


def a_plan(name: str = "unet", **changes: Any) -> Plan:
    depth = 5 if name == "unet++" else 2
    plan = make_plan(StudyConfig())
    return plan.model_copy(update={"model": name, "width": 2, "depth": depth, **changes})


def network(seed: int, **changes: Any) -> nn.Module:
    return build_model(a_plan(**changes), seed=seed)


def weights(seed: int = 1, **changes: Any) -> State:
    return network(seed, **changes).state_dict()


def other_classes(plan: Plan, classes: int) -> State:
    torch.manual_seed(1)
    return MODELS[plan.model](plan, 1, classes).state_dict()


def same(model: nn.Module, state: State) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def saved(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return str(path)


def refused(source: str, *words: str, model: nn.Module | None = None, **options: Any) -> str:
    """The one line of the error; the network stays as it was."""
    model = model or network(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        start_from(model, source, **options)
    text = str(caught.value)
    assert text.startswith("model.init-from: ") and "\n" not in text
    for word in words:
        assert word in text
    assert same(model, before)
    return text


def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "2026-01-01"
    folder.mkdir(parents=True)
    save_model(folder / BEST, weights(), a_plan())
    return folder


def zipped(tmp_path: Path) -> str:
    saved(tmp_path / "liver" / "models" / "model.pt", weights())
    return shutil.make_archive(str(tmp_path / "liver"), "zip", tmp_path, "liver")


def test_every_kind_of_source_gives_its_weights(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    save_file(weights(), foreign)
    bundle = Path(saved(tmp_path / "bundle" / "models" / "model.pt", weights())).parents[1]
    sources = [
        str(run),
        run.name,
        str(run / BEST),
        str(foreign),
        str(bundle),
        zipped(tmp_path),
        saved(tmp_path / "plain.pt", weights()),
        saved(tmp_path / "model.ckpt", {"epoch": 3, "state_dict": weights()}),
    ]
    for source in sources:
        model = network(0)
        assert not same(model, weights())
        notes = start_from(model, source, runs=tmp_path / "runs")
        assert same(model, weights()), source
        assert notes == [f"{len(weights())} of {len(weights())} tensors from '{source}'"]


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "network._orig_mod."])
@pytest.mark.parametrize("nest", ["state_dict", "model", "network_weights", ""])
def test_prefixes_and_nesting_are_seen_through(tmp_path: Path, prefix: str, nest: str) -> None:
    state = {prefix + name: tensor for name, tensor in weights().items()}
    content = {nest: state, "epoch": 7} if nest else state
    model = network(0)
    start_from(model, saved(tmp_path / "checkpoint.pt", content))
    assert same(model, weights())


def test_weights_of_the_bare_monai_network_fit_our_wrapped_one(tmp_path: Path) -> None:
    state = {n.removeprefix("network."): t for n, t in weights(name="unet++").items()}
    model = network(0, name="unet++")
    start_from(model, saved(tmp_path / "m.pt", state))
    assert same(model, weights(name="unet++"))


def test_half_precision_weights_come_as_float32(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in weights().items()}
    model = network(0)
    start_from(model, saved(tmp_path / "m.pt", halves))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert same(model, {name: tensor.float() for name, tensor in halves.items()})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [2, 14])
def test_other_number_of_classes_gives_a_seeded_head(
    tmp_path: Path, name: str, classes: int
) -> None:
    plan = a_plan(name)
    state = other_classes(plan, classes)
    model = network(0, name=name)
    seeded = weights(0, name=name)
    notes = start_from(model, saved(tmp_path / "m.pt", state))
    assert f"it has {classes} classes, the study 3: the head starts anew" in notes
    bare = {
        f"network.{n}" if name == "unet++" and n not in seeded else n: t for n, t in state.items()
    }
    fresh = {n for n in seeded if bare[n].shape != seeded[n].shape}
    assert 0 < len(fresh) < len(seeded) / 2
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, seeded[key] if key in fresh else bare[key]), key


def test_a_part_needs_consent_and_is_listed(tmp_path: Path) -> None:
    state = weights()
    gone, changed = list(state)[:2]
    state = {n: t for n, t in state.items() if n != gone} | {changed: torch.zeros(7)}
    source = saved(tmp_path / "m.pt", {**state, "optimizer.step": torch.zeros(())})
    refused(source, gone, changed, "1 of", "1 are missing", "model.init-partial=true")
    model = network(0)
    notes = start_from(model, source, allow_partial=True)
    expected = {n: weights(0 if n in (gone, changed) else 1)[n] for n in weights()}
    assert same(model, expected)
    listed = [line for line in notes if line.startswith("starts anew: ")]
    assert len(listed) == 2 and changed in listed[0] and gone in listed[1]
    assert notes[-1] == "not used: optimizer.step"


def test_another_width_says_whose_it_is(tmp_path: Path) -> None:
    save_model(tmp_path / "wide.safetensors", weights(width=4), a_plan(width=4))
    refused(
        str(tmp_path / "wide.safetensors"),
        "its network is unet of width 4 and depth 2",
        "set model.*",
        allow_partial=False,
    )


def test_nothing_that_fits_is_an_error_even_with_consent(tmp_path: Path) -> None:
    source = saved(tmp_path / "m.pt", {"encoder.weight": torch.zeros(3)})
    refused(source, "shares no tensor with the network", allow_partial=True)


class Planted:
    """What a hostile file runs on the machine that unpickles it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    target = tmp_path / "planted"
    source = saved(tmp_path / "m.pt", {"state_dict": weights(), "extra": Planted(target)})
    refused(source, "more than weights (posix mkdir)", "never loaded")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Planted(target)))
    refused(str(tmp_path / "raw.pt"), "no file of torch.save")
    assert not target.exists()
    torch.load(source, weights_only=False)  # it would have
    assert target.exists()


class Large:
    """A pickle of a few bytes that torch's weights-only loader would make a gigabyte of."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (2**30,)


def test_checkpoint_cannot_ask_for_memory(tmp_path: Path) -> None:
    source = saved(tmp_path / "m.pt", {**weights(), "extra": Large()})
    assert Path(source).stat().st_size < 10**5
    refused(source, "more than weights (__builtin__ bytearray)")


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path / "m.pt", network(1)), "more than weights", "state_dict()")


def _truncated(tmp_path: Path) -> str:
    path = Path(saved(tmp_path / "m.pt", weights()))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


def _empty(tmp_path: Path) -> str:
    (tmp_path / "m.pt").touch()
    return str(tmp_path / "m.pt")


def _cut_safetensors(tmp_path: Path) -> str:
    path = tmp_path / "m.safetensors"
    save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:-8])
    return str(path)


def _zip_without_model(tmp_path: Path) -> str:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("configs/metadata.json", "{}")
    return str(tmp_path / "m.zip")


def _no_zip(tmp_path: Path) -> str:
    (tmp_path / "m.zip").write_bytes(b"PK\x03\x04 and then nothing")
    return str(tmp_path / "m.zip")


def _zip_of_other_zip(tmp_path: Path) -> str:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02N.")
    return str(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: str(path / "nowhere.pt"), "no such run or file"),
        (lambda path: "2026-01-01", "no such run or file"),
        (str, "neither model-best.safetensors nor models/model.pt"),
        (_truncated, "damaged, or no file of torch.save"),
        (_empty, "damaged, or no file of torch.save"),
        (_cut_safetensors, "no readable .safetensors file"),
        (_zip_without_model, "holds 0 files models/model.pt"),
        (_no_zip, "can't be read"),
        (_zip_of_other_zip, "can't be read"),
        (lambda path: saved(path / "m.pt", torch.zeros(3)), "no tensors by name"),
        (lambda path: saved(path / "m.pt", {"model": {"model": {"model": {}}}}), "no tensors"),
        (lambda path: saved(path / "m.pt", {"epoch": 3}), "no tensors by name"),
    ],
)
def test_bad_source_is_one_line(tmp_path: Path, make: Any, words: str) -> None:
    refused(make(tmp_path), words, runs=tmp_path / "runs")


def test_huge_files_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = tmp_path / "sparse.pt"
    with sparse.open("wb") as file:
        file.truncate(start.MAX_BYTES + 1)
    refused(str(sparse), "has 4.3 GB; expected at most 4.3 GB")
    monkeypatch.setattr(start, "MAX_BYTES", 2**20)
    bomb = Path(saved(tmp_path / "bomb.pt", {"x": torch.zeros(2**19)}))
    with (
        zipfile.ZipFile(bomb) as parts,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in parts.namelist():
            packed.writestr(name, parts.read(name))
    assert (tmp_path / "packed.pt").stat().st_size < 2**14
    refused(str(tmp_path / "packed.pt"), "expected at most 0.0 GB")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as outer:
        outer.write(bomb, "b/models/model.pt")
    assert (tmp_path / "bomb.zip").stat().st_size < 2**14
    refused(str(tmp_path / "bomb.zip"), "expected at most 0.0 GB")


def test_a_tensor_that_claims_to_be_large_takes_no_memory(tmp_path: Path) -> None:
    first = next(iter(weights()))
    wide = torch.zeros(1).expand(10**6, 10**6)
    source = saved(tmp_path / "m.pt", {**weights(), first: wide})
    assert Path(source).stat().st_size < 10**6
    refused(source, "1 of", "[1000000, 1000000]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(tmp_path: Path, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in weights().items()}
    name = next(iter(state))
    state[name].view(-1)[0] = value
    refused(saved(tmp_path / "m.pt", state), "NaN or Inf", name)


def test_demo_fits_a_network_of_its_width() -> None:
    source = read_weights("demo")
    assert source.plan is not None
    model = build_model(source.plan, seed=0)
    (note,) = fit_weights(model, source)
    assert note.endswith("tensors from 'demo'")
    refused("demo", "its network is unet of width 8 and depth 5")
