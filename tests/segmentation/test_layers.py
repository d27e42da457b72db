"""Layers against PyTorch's own in float64 or float32, and NumPy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan
from fedseg.segmentation.layers import memory_format, place, swap_layers
from fedseg.segmentation.models import MODELS, build_model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_values_and_gradients_are_those_of_instance_norm(batch: int, affine: bool) -> None:
    torch.manual_seed(0)
    own = nn.InstanceNorm3d(5, affine=affine).double()
    if affine:
        nn.init.normal_(own.weight)
        nn.init.normal_(own.bias)
    fast = copy.deepcopy(own)
    swap_layers(fast)
    image = 3 + 2 * torch.randn(batch, 5, 6, 7, 8, dtype=torch.float64)
    image = image.contiguous(memory_format=torch.channels_last_3d)
    toward = torch.randn_like(image)
    gradients = []
    # PyTorch's own gradient is wrong for one channels-last sample: it gets channels first.
    for norm, layout in ((own, torch.contiguous_format), (fast, torch.channels_last_3d)):
        source = image.clone(memory_format=layout).requires_grad_()
        found = norm(source)
        parameters = list(norm.parameters())
        along = toward.contiguous(memory_format=layout)
        gradients.append([found, *torch.autograd.grad(found, [source, *parameters], along)])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    if batch > 1:  # of one sample both memory formats are the same
        assert gradients[1][0].is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_offset_is_taken_out_as_exactly_as_the_format_allows(dtype: torch.dtype) -> None:
    """Two patches of 32^3 around 20 with spread 1: naive sums of squares would lose digits."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(20 + rng.standard_normal((2, 4, 32, 32, 32))).to(dtype)
    image = image.contiguous(memory_format=torch.channels_last_3d)
    values = image.double().numpy()
    mean, variance = values.mean((2, 3, 4), keepdims=True), values.var((2, 3, 4), keepdims=True)
    expected = (values - mean) / np.sqrt(variance + 1e-5)
    found = swap_layers(nn.InstanceNorm3d(4))(image)
    assert found.dtype == dtype
    gap = np.abs(found.double().numpy() - expected).max()
    assert gap < (1e-4 if dtype == torch.float32 else 0.03)


def test_training_with_one_patch_a_step_has_the_right_gradient() -> None:
    """Channels last or first, PyTorch's normalisation or this one: the gradient of the U-Net."""
    config = {"model.width": 4, "model.depth": 3, "train.patch-size": "16,16,16"}
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    gradients = []
    for fast in (False, True):
        network = build_model(make_plan(StudyConfig.from_run_config(config)), seed=0).double()
        layout = torch.channels_last_3d if fast else torch.contiguous_format
        network = network.to(memory_format=layout)  # type: ignore[call-overload]
        if fast:
            swap_layers(network)
        loss = network(image.contiguous(memory_format=layout)).pow(2).mean()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_networks_keep_their_state_and_their_answers(name: str) -> None:
    config = {"model.name": name, "model.width": 4, "train.patch-size": "32,32,32"}
    own = build_model(make_plan(StudyConfig.from_run_config(config)), seed=0).eval()
    fast = swap_layers(copy.deepcopy(own))
    assert list(own.state_dict()) == list(fast.state_dict())
    image = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = own(image), fast(image)
    assert torch.allclose(a, b, atol=2e-3 * float(a.abs().max()))
    optimizer_keys = [id(p) for p in fast.parameters()]
    swap_layers(fast)  # twice does nothing more
    assert [id(p) for p in fast.parameters()] == optimizer_keys


def test_normalisations_with_running_averages_and_other_dimensions_are_left_alone() -> None:
    kept = nn.Sequential(nn.InstanceNorm3d(2, track_running_stats=True), nn.InstanceNorm2d(2))
    swap_layers(kept)
    assert [type(m) for m in kept] == [nn.InstanceNorm3d, nn.InstanceNorm2d]
    unbatched = torch.randn(2, 4, 4, 4)
    expected = nn.InstanceNorm3d(2)(unbatched)
    assert torch.equal(swap_layers(nn.InstanceNorm3d(2))(unbatched), expected)


@pytest.mark.parametrize("layer", [nn.Conv3d, nn.ConvTranspose3d])
@pytest.mark.parametrize("sides", [(2, 2, 2), (2, 4, 8), (4, 1, 2), (3, 3, 3)])
def test_bf16_gradients_of_the_smallest_images_have_nothing_of_other_memory(
    layer: type[nn.Conv3d], sides: tuple[int, int, int]
) -> None:
    """In bf16 oneDNN takes what lay in memory before into the weights' gradient (torch 2.13)."""
    torch.manual_seed(0)
    own = layer(16, 32, 3, padding=1)
    image = torch.randn(2, 16, *sides)
    answer = own(image)
    toward = torch.randn_like(answer)
    parameters = list(own.parameters())
    expected = torch.autograd.grad(answer, parameters, toward)
    placed = place(copy.deepcopy(own), torch.device("cpu"))
    for _ in range(3):
        leave_nan_in_memory()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = placed(image.contiguous(memory_format=torch.channels_last_3d))
        wide = min(sides) < 3
        assert answer.dtype == (torch.float32 if wide else torch.bfloat16)
        leave_nan_in_memory()
        found = torch.autograd.grad(answer, list(placed.parameters()), toward.to(answer.dtype))
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).abs().max()) < 0.02 * float(b.abs().max())


def leave_nan_in_memory() -> None:
    """Fill and free blocks of many sizes: what is allocated next holds NaN."""
    blocks = [torch.full((2**power,), torch.nan) for power in range(4, 20) for _ in range(3)]
    del blocks


def test_outside_autocast_a_convolution_is_pytorchs_own() -> None:
    own = nn.Conv3d(2, 3, 3, padding=1).double()
    image = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64)
    assert torch.equal(swap_layers(copy.deepcopy(own))(image), own(image))


def test_a_network_is_placed_as_its_images_lie() -> None:
    own = build_model(make_plan(StudyConfig.from_run_config({"model.width": 2})), seed=0)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    held = [id(p) for p in own.parameters()]  # by an optimiser
    cpu = torch.device("cpu")
    placed = place(own, cpu)
    assert placed is own
    assert [id(p) for p in placed.parameters()] == held
    assert all(torch.equal(before[name], tensor) for name, tensor in own.state_dict().items())
    kernels = [p for p in placed.parameters() if p.dim() == 5]
    assert kernels
    assert all(p.is_contiguous(memory_format=memory_format(cpu)) for p in kernels)


def test_mps_keeps_the_plain_memory_format() -> None:
    for device in ("cpu", "cuda"):
        assert memory_format(torch.device(device)) is torch.channels_last_3d
    assert memory_format(torch.device("mps")) is torch.contiguous_format
