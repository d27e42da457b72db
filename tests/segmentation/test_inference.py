"""Tests of sliding-window inference: where windows lie, how they join, and little memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import dense_patch_slices
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.errors import ModelError
from fedseg.segmentation.inference import _overlap, predict_logits

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


@pytest.mark.parametrize(
    ("windows_that_fit", "expected"), [(1, (1, 1, 24, 24, 24)), (0.5, (1, 1, 16, 16, 16))]
)
def test_out_of_memory_means_fewer_then_smaller_windows(
    windows_that_fit: float, expected: tuple[int, ...]
) -> None:
    plan = PLAN.model_copy(update={"inference_patch": (24, 24, 24)})
    image = scan((30, 26, 24))
    network = ByIntensity(memory=int(windows_that_fit * 24**3))
    logits = predict(network, image, plan)
    assert set(network.seen) == {torch.Size(expected)}
    assert torch.allclose(logits, predict(ByIntensity(), image, plan), atol=1e-3)


def test_no_memory_at_all_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"cpu: no memory for one window of \(16, 16, 16\) voxels"):
        predict(ByIntensity(memory=100), scan((16, 16, 16)))
