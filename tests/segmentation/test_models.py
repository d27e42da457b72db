"""Tests of the networks: a contract for every registered one, and custom ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.errors import ConfigError, ModelError
from fedseg.segmentation.models import (
    MODELS,
    build_model,
    check_logits,
    check_patch,
    parameter_count,
)
from fedseg.segmentation.sharing import split_state


def a_plan(model: str, *, width: int = 2, depth: int | None = None, patch: int = 32) -> Plan:
    study = StudyConfig.from_run_config(
        {
            "model.name": model,
            "model.width": width,
            "model.depth": depth or (5 if model == "unet++" else 3),
            "train.patch-size": f"{patch},{patch},{patch}",
        }
    )
    return make_plan(study)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [3, 5])
def test_one_logits_tensor_of_the_inputs_size(name: str, width: int) -> None:
    network = build_model(a_plan(name, width=width), seed=0)
    for size in ((32, 32, 32), (32, 48, 64)):
        with torch.inference_mode():
            logits = network(torch.randn(2, 1, *size))
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (2, 3, *size)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "depth"),
    [(name, depth) for name in ("unet", "attention-unet") for depth in (2, 3, 4, 6)],
)
def test_other_depths(name: str, depth: int) -> None:
    plan = a_plan(name, depth=depth, patch=2**depth)
    check_patch(plan, levels_matter=True)
    check_logits(build_model(plan, seed=0), plan)


@pytest.mark.parametrize("name", MODELS)
def test_two_voxels_at_the_deepest_level_can_be_trained(name: str) -> None:
    plan = a_plan(name, depth=5, patch=32)
    check_patch(plan, levels_matter=True)
    network = build_model(plan, seed=0).train()
    network(torch.randn(1, 1, 32, 32, 32)).square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > len(gradients) / 2


@pytest.mark.parametrize("name", MODELS)
def test_no_batch_statistics_and_the_same_answer_alone_and_in_a_batch(name: str) -> None:
    network = build_model(a_plan(name), seed=0).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert list(network.buffers()) == []
    network.eval()
    images = torch.randn(2, 1, 32, 32, 32)
    with torch.inference_mode():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4)


def test_parameter_counts_are_within_a_factor_of_2_at_the_defaults() -> None:
    counts = {}
    for name in MODELS:
        plan = make_plan(StudyConfig.from_run_config({"model.name": name}))
        counts[name] = parameter_count(build_model(plan))
    assert max(counts.values()) < 2 * min(counts.values()), counts


@pytest.mark.parametrize("name", MODELS)
def test_seeded_weights_are_bit_identical_and_the_global_rng_is_left_alone(name: str) -> None:
    plan = a_plan(name)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(plan, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = build_model(plan, seed=3).state_dict(), build_model(plan, seed=4).state_dict()
    assert list(first) == list(again)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", ["all", "all-but-norm", "all-but-head"])
def test_what_is_shared_and_what_stays(name: str, shared: str) -> None:
    network = build_model(a_plan(name))
    parts = split_state(network, shared)
    assert {*parts.shared, *parts.local} == set(network.state_dict())
    assert parts.fixed == {}
    assert bool(parts.local) == (shared != "all")
    if shared == "all-but-norm":
        assert all(tensor.dim() == 1 for tensor in parts.local.values())
    if shared == "all-but-head":
        assert sorted(len(tensor) for tensor in parts.local.values()) == [3, 3]


@pytest.mark.parametrize(
    ("depth", "patch", "window", "words"),
    [
        (4, "64,64,60", "", "train.patch-size: got 64,64,60; expected multiples of 8.*nearest: 64"),
        (4, "64,4,64", "", "multiples of 8 .*nearest: 16"),
        (4, "64,64,64", "64,64,65", "train.inference-patch: got 64,64,65; expected multiples of 8"),
        (5, "64,64,16", "", "16 leaves 1 voxel at the deepest of 5 levels.*take 32"),
        (5, "64,64,64", "16,64,64", "train.inference-patch: .*expected at least 2"),
    ],
)
def test_patch_that_does_not_fit(depth: int, patch: str, window: str, words: str) -> None:
    config = {"model.depth": depth, "train.patch-size": patch, "train.inference-patch": window}
    plan = make_plan(StudyConfig.from_run_config(config))
    with pytest.raises(ConfigError, match=words):
        check_patch(plan, levels_matter=True)
    check_patch(plan, levels_matter=False)


def test_default_patch_fits() -> None:
    check_patch(make_plan(StudyConfig()), levels_matter=True)


@pytest.mark.parametrize("depth", [4, 6])
def test_unet_plus_plus_has_five_levels(depth: int) -> None:
    with pytest.raises(ConfigError, match=f"model.depth: got {depth}; expected 5 .*'unet\\+\\+'"):
        build_model(a_plan("unet++", depth=depth, patch=64))


CUSTOM = """
import torch
from torch import nn

def fine(plan, in_channels, classes):
    return nn.Conv3d(in_channels, classes, 3, padding=1)

def batch_norm(plan, in_channels, classes):
    return nn.Sequential(fine(plan, in_channels, classes), nn.BatchNorm3d(classes))

class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 1)
    def forward(self, image):
        return [self.conv(image)]

def listed(plan, in_channels, classes):
    return Listed()

def strided(plan, in_channels, classes):
    return nn.Conv3d(in_channels, classes, 3, stride=2)

def two_classes(plan, in_channels, classes):
    return nn.Conv3d(in_channels, 2, 1)

def flat(plan, in_channels, classes):
    return nn.Conv2d(in_channels, classes, 3)

def no_module(plan, in_channels, classes):
    return 3

number = 3
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_networks.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: a_plan(f"my_networks:{name}", patch=16)


def test_custom_network(custom: Any) -> None:
    plan = custom("fine")
    network = build_model(plan, seed=1)
    assert isinstance(network, nn.Conv3d)
    check_logits(network, plan)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch_norm", r"keeps batch statistics \(BatchNorm3d\); use instance or group"),
        ("no_module", "returned int; expected a torch Module"),
    ],
)
def test_custom_network_that_is_refused(custom: Any, name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build_model(custom(name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("listed", r"gave list; expected one logits tensor \(1, 3, 16, 16, 16\)"),
        ("strided", r"gave \(1, 3, 7, 7, 7\); expected"),
        ("two_classes", r"gave \(1, 2, 16, 16, 16\); expected"),
        ("flat", r"fails on a patch \(16, 16, 16\) .*expected input \[B, 1, x, y, z\]"),
    ],
)
def test_custom_network_without_one_logits_tensor(custom: Any, name: str, words: str) -> None:
    plan = custom(name)
    network = build_model(plan)
    with pytest.raises(ModelError, match=words) as caught:
        check_logits(network, plan)
    assert "\n" not in str(caught.value)


def test_custom_network_that_is_not_there(custom: Any) -> None:
    with pytest.raises(ConfigError, match="module my_networks has no function number"):
        build_model(custom("number"))
    with pytest.raises(ModuleNotFoundError):
        build_model(a_plan("no_such_package_here:network"))
    with pytest.raises(ConfigError, match="did you mean 'unet'"):
        build_model(custom("fine").model_copy(update={"model": "unett"}))
