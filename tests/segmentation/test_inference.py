"""Tests of sliding-window inference: where windows lie, how they join, and little memory."""

import itertools
import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import dense_patch_slices
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.plan import CLASSES, Plan
from fedseg.data.planning import make_plan
from fedseg.errors import ModelError, out_of_memory
from fedseg.segmentation.inference import (
    Way,
    _has_room,
    _overlap,
    predict_logits,
    ways_to_predict,
)

CPU = torch.device("cpu")
PLAN = make_plan(StudyConfig()).model_copy(
    update={"patch_size": (16, 16, 16), "inference_patch": (16, 16, 16)}
)


class ByIntensity(nn.Module):
    """A network that knows the answer, and how many windows of which size it was given."""

    def __init__(self, memory: int = 10**9) -> None:
        super().__init__()
        self.memory = memory
        self.seen: list[torch.Size] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if image.numel() > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(image.shape)
        return 20 * torch.cat([-image.abs(), 0.9 * image - 0.5, 2 * image - 2], 1)


def scan(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)


def predict(network: nn.Module, image: np.ndarray, plan: Plan = PLAN) -> torch.Tensor:
    return predict_logits(network, image, plan, device=CPU, precision="fp32")


@pytest.mark.parametrize("shape", [(5, 9, 40), (16, 16, 16), (50, 17, 31)])
def test_windows_give_what_the_whole_gives(shape: tuple[int, int, int]) -> None:
    image = scan(shape)
    logits = predict(ByIntensity(), image)
    expected = ByIntensity()(torch.from_numpy(image)[None, None])[0]
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=1e-3)


@given(size=st.integers(1, 300), window=st.integers(1, 128))
def test_windows_are_spaced_evenly_and_at_most_half_a_window_apart(size: int, window: int) -> None:
    overlap = _overlap(size, window)
    assert 0 <= overlap < 1
    whole = max(size, window)  # MONAI pads
    step = max(1, int(window * (1 - overlap)))
    starts = [part[0].start for part in dense_patch_slices([whole], [window], [step])]
    half = max(1, window // 2)
    assert len(starts) <= 1 + -(-(whole - window) // half)
    assert (starts[0], starts[-1]) == (0, whole - window)
    if len(starts) > 1:
        gaps = np.diff(starts)
        assert gaps.max() <= half
        assert gaps.max() - gaps.min() < len(starts)


def test_no_more_windows_than_steps_of_half_a_window_need() -> None:
    network = ByIntensity()
    predict(network, scan((27, 16, 33)))
    assert sum(shape[0] for shape in network.seen) == 3 * 1 * 4
    assert {tuple(shape[2:]) for shape in network.seen} == {(16, 16, 16)}


def test_the_window_is_the_plans() -> None:
    network = ByIntensity()
    predict(network, scan((40, 40, 40)), PLAN.model_copy(update={"inference_patch": (24, 40, 32)}))
    assert {tuple(shape[2:]) for shape in network.seen} == {(24, 40, 32)}


def test_windows_are_counted() -> None:
    seen: list[tuple[int, int]] = []
    network = ByIntensity()
    for shape in ((5, 9, 40), (16, 16, 16), (50, 17, 31)):
        seen.clear()
        predict_logits(
            network, scan(shape), PLAN, device=CPU, on_windows=lambda *counts: seen.append(counts)
        )
        done, totals = zip(*seen, strict=True)
        assert done[-1] == totals[0]
        assert list(done) == sorted(set(done))
        assert len(set(totals)) == 1


class OneSided(nn.Module):
    """A network that sees what lies to the left, in front and below otherwise than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, CLASSES, 3, padding=1)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.calls = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits: torch.Tensor = self.layer(image)
        return logits


@pytest.mark.parametrize("flips", [(), (1,), (0, 2), (0, 1, 2)])
def test_flips_are_a_mean_over_mirrored_images(flips: tuple[int, ...]) -> None:
    image = scan((16, 16, 16))
    network = OneSided()
    found = predict_logits(network, image, PLAN, device=CPU, precision="fp32", flips=flips)
    assert network.calls == 2 ** len(flips)
    sums = np.zeros((CLASSES, 16, 16, 16))
    for turn in itertools.product((False, True), repeat=len(flips)):
        axes = [axis for axis, turned in zip(flips, turn, strict=True) if turned]
        turned = torch.from_numpy(np.flip(image, axes).copy())[None, None]
        with torch.inference_mode():
            logits = network.layer(turned)[0].numpy()
        sums += np.flip(logits, [axis + 1 for axis in axes])
    assert np.allclose(found, sums / 2 ** len(flips), atol=1e-4)


def test_mirrored_images_give_mirrored_logits_with_flips() -> None:
    image = scan((20, 17, 16))
    there, back = (
        predict_logits(OneSided(), one, PLAN, device=CPU, precision="fp32", flips=(0,)).numpy()
        for one in (image, image[::-1].copy())
    )
    # The windows of 20 voxels lie at 0 and 4: mirrored they are the same.
    assert np.allclose(there, back[:, ::-1], atol=1e-4)


@pytest.mark.parametrize(
    ("windows_that_fit", "expected"),
    [(2, (2, 1, 24, 24, 24)), (1, (1, 1, 24, 24, 24)), (0.5, (1, 1, 16, 16, 16))],
)
def test_out_of_memory_means_fewer_then_smaller_windows(
    windows_that_fit: float, expected: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    plan = PLAN.model_copy(update={"inference_patch": (24, 24, 24)})
    image = scan((36, 26, 24))
    network = ByIntensity(memory=int(windows_that_fit * 24**3))
    with caplog.at_level(logging.WARNING, "fedseg"):
        logits = predict(network, image, plan)
    assert set(network.seen) == {torch.Size(expected)}
    assert torch.allclose(logits, predict(ByIntensity(), image, plan), atol=1e-3)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("no memory for 4 windows of 24x24x24 at once on cpu; going on with ")
    sides = "x".join(map(str, expected[2:]))
    assert f"; going on with {expected[0]} window" in lines[-1]
    assert f" of {sides} at once on cpu" in lines[-1]
    assert not any("\n" in line for line in lines)


def test_what_failed_is_not_tried_again() -> None:
    network = ByIntensity(memory=16**3)
    ways = ways_to_predict(PLAN, CPU)
    tried: list[int] = []
    network.register_forward_pre_hook(lambda module, args: tried.append(len(args[0])))
    for _ in range(2):
        predict_logits(network, scan((16, 16, 16)), PLAN, device=CPU, ways=ways)
        predict_logits(network, scan((40, 16, 16)), PLAN, device=CPU, ways=ways)
    assert [n for n in tried if n > 1] == [4, 2]
    assert [way.at_once for way in ways] == [1]


def test_a_scan_that_nothing_does_for_leaves_the_ways_as_they_were() -> None:
    ways = ways_to_predict(PLAN, CPU)
    with pytest.raises(ModelError):
        predict_logits(ByIntensity(memory=100), scan((16, 16, 16)), PLAN, device=CPU, ways=ways)
    assert ways == ways_to_predict(PLAN, CPU)


@pytest.mark.parametrize(("free", "expected"), [(33 * 10**6, True), (31 * 10**6, False)])
def test_windows_are_joined_on_a_gpu_that_has_room(
    free: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three logits and a weight of 4 bytes each for a million voxels, and as much again."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    assert _has_room(torch.device("cuda"), 10**6) is expected
    assert _has_room(CPU, 10**12)


def test_ways_take_less_and_less_memory() -> None:
    plan = PLAN.model_copy(update={"inference_patch": (24, 24, 24)})
    cuda = torch.device("cuda", 1)
    large, small = (24, 24, 24), (16, 16, 16)
    on_cpu = [(CPU, CPU, large, n) for n in (4, 2, 1)] + [(CPU, CPU, small, 1)]
    on_gpu = [(cuda, cuda, large, n) for n in (4, 2, 1)]
    on_gpu += [(cuda, CPU, large, 1), (cuda, CPU, small, 1)]

    def listed(plan: Plan, device: torch.device) -> list[tuple[object, ...]]:
        ways = ways_to_predict(plan, device)
        return [(way.device, way.joined, way.window, way.at_once) for way in ways]

    assert listed(plan, CPU) == on_cpu
    assert listed(plan, cuda) == on_gpu + on_cpu
    assert len(ways_to_predict(PLAN, CPU)) == 3  # its windows are those of training already
    assert {way.joined for way in ways_to_predict(plan, torch.device("mps"))} == {CPU}
    assert str(ways_to_predict(plan, cuda)[3]) == (
        "1 window of 24x24x24 at once on cuda:1, joined on cpu"
    )


def test_a_device_without_memory_hands_over_to_the_cpu() -> None:
    """`meta` stands for a GPU: tensors can be moved there, and computing fails."""

    class Full(ByIntensity):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if image.device.type == "meta":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(image)

    meta = torch.device("meta")
    ways = [Way(device=meta, joined=CPU, window=(16, 16, 16), at_once=1)]
    ways += ways_to_predict(PLAN, CPU)
    image = scan((30, 16, 16))
    logits = predict_logits(Full(), image, PLAN, device=meta, ways=ways)
    assert torch.allclose(logits, predict(ByIntensity(), image), atol=1e-3)
    assert ways == ways_to_predict(PLAN, CPU)


def test_no_memory_at_all_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"^no memory for 1 window of 16x16x16 at once on cpu; "):
        predict(ByIntensity(memory=100), scan((16, 16, 16)))


def _real_cpu_error() -> BaseException:
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("so much memory?")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_real_cpu_error, True),
        (lambda: MemoryError(), True),
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (lambda: RuntimeError("std::bad_alloc"), True),
        (lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (lambda: RuntimeError("expected 5D input"), False),
        (lambda: ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(
    error: Callable[[], BaseException], expected: bool
) -> None:
    assert out_of_memory(error()) is expected


def test_other_errors_of_a_network_are_not_hidden() -> None:
    class Broken(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("expected 5D input")

    with pytest.raises(RuntimeError, match="expected 5D input"):
        predict(Broken(), scan((16, 16, 16)))


_LIMITED = """
import resource, sys
import numpy as np, torch
from fedseg.errors import ModelError, out_of_memory
from fedseg.segmentation.inference import predict_logits, ways_to_predict
from fedseg.segmentation.model_file import load_model
from fedseg.logs import show_logs

torch.set_num_threads(1)
show_logs()
network, plan = load_model(sys.argv[1])
image = np.random.default_rng(0).normal(0, 1, (160, 64, 64)).astype(np.float32)
cpu = torch.device("cpu")
ask = dict(device=cpu, precision="fp32")
predict_logits(network, image[:32, :32, :32], plan, **ask)  # loads what is loaded once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for more in range(40, 2000, 20):  # the least that does, on any machine
    resource.setrlimit(resource.RLIMIT_AS, (used + more * 2**20, -1))
    ways = ways_to_predict(plan, cpu)
    try:
        limited = predict_logits(network, image, plan, ways=ways, **ask)
        break
    except ModelError as error:
        print(error, file=sys.stderr)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
free = predict_logits(network, image, plan, **ask)
print(ways[0].at_once, float((free - limited).abs().max()))
"""
