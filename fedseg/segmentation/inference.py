"""Predict a whole volume by sliding window, in as much memory as there is."""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data.utils import dense_patch_slices
from monai.inferers import sliding_window_inference
from torch import nn

from fedseg.data.plan import CLASSES, Plan
from fedseg.data.preprocess import Modality, prepare, restore
from fedseg.data.volumes import Volume
from fedseg.errors import ModelError, out_of_memory
from fedseg.segmentation.layers import memory_format, place
from fedseg.segmentation.training import choose_dtype

__all__ = [
    "OnWindows",
    "Way",
    "predict_labels",
    "predict_logits",
    "ways_to_predict",
]

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")

_BLEND = 0.25
"""Standard deviation of a window's weight, as a share of its side. MONAI's .125 hardly blends."""

_AT_ONCE = 4
"""Windows a forward pass; with one, oneDNN falls back to code 3 times slower in fp32."""

OnWindows = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How much memory a prediction takes, and where.

    Attributes:
        device: Where the network runs.
        joined: Where windows are joined to a volume.
        window: Voxels of a window.
        at_once: Windows a forward pass.
    """

    device: torch.device
    joined: torch.device
    window: tuple[int, int, int]
    at_once: int

    def __str__(self) -> str:
        """Say it to a person."""
        windows = f"{self.at_once} windows" if self.at_once > 1 else "1 window"
        joined = "" if self.joined == self.device else f", joined on {self.joined}"
        return f"{windows} of {'x'.join(map(str, self.window))} at once on {self.device}{joined}"


def ways_to_predict(plan: Plan, device: torch.device) -> list[Way]:
    """List ways to predict, each with less memory than the one before.

    Fewer windows at once; then joined on the CPU; then windows no larger than in training; then all
    on the CPU.
    """
    joined = device if device.type == "cuda" else _CPU
    halved = [_AT_ONCE // 2**n for n in range(_AT_ONCE.bit_length())]
    wanted = plan.inference_patch
    ways = [Way(device=device, joined=joined, window=wanted, at_once=n) for n in halved]
    if joined != _CPU:
        ways.append(Way(device=device, joined=_CPU, window=wanted, at_once=1))
    if math.prod(plan.patch_size) < math.prod(wanted):
        ways.append(Way(device=device, joined=_CPU, window=plan.patch_size, at_once=1))
    return ways if device.type == "cpu" else ways + ways_to_predict(plan, _CPU)


def predict_logits(
    network: nn.Module,
    image: np.ndarray,
    plan: Plan,
    *,
    device: torch.device,
    precision: str = "auto",
    flips: Sequence[int] = (),
    ways: list[Way] | None = None,
    on_windows: OnWindows | None = None,
) -> torch.Tensor:
    """Predict logits float32 `[C, x, y, z]` on the CPU for a prepared image `[x, y, z]`.

    Where memory runs out, the next of the ways is taken, and one line in the log says so.

    Args:
        network: The network; it is moved.
        image: The image.
        plan: The plan.
        device: Where to begin.
        precision: Number format, see `training.choose_dtype`.
        flips: Axes 0, 1, 2 of `[x, y, z]`: logits are averaged over all mirrored images, so 1, 2
            or 3 axes take 2, 4 or 8 times as long (test-time augmentation as in nnU-Net).
        ways: What is tried, `ways_to_predict` by default; those that failed before one did are
            taken out of the list, so that the next scan doesn't try them again.
        on_windows: Called with the windows done and their total.

    Raises:
        ModelError: There is no memory for any of the ways.
    """
    ways = ways_to_predict(plan, device) if ways is None else ways
    volume = torch.from_numpy(np.asarray(image, np.float32))[None, None]
    for way, following in zip(ways, [*ways[1:], None], strict=True):
        try:
            logits = _slide(network, volume, way, precision, flips, on_windows)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if following:
                log.warning("no memory for %s; going on with %s", way, following)
            continue
        del ways[: ways.index(way)]
        return logits
    raise ModelError(f"no memory for {ways[-1]}; free memory, or take another machine")


def _slide(
    network: nn.Module,
    volume: torch.Tensor,
    way: Way,
    precision: str,
    flips: Sequence[int],
    on_windows: OnWindows | None,
) -> torch.Tensor:
    device, window = way.device, way.window
    place(network, device).eval()
    dtype = choose_dtype(precision, device)
    overlap = [_overlap(n, side) for n, side in zip(volume.shape[2:], window, strict=True)]
    total, done = _window_count(volume.shape[2:], window, overlap), 0

    def forward(windows: torch.Tensor) -> torch.Tensor:
        nonlocal done
        logits = _mean_over_flips(network, windows, flips, dtype)
        done += len(windows)
        if on_windows:
            on_windows(done, total)
        return logits

    with torch.inference_mode():
        logits = sliding_window_inference(
            volume,
            roi_size=window,
            sw_batch_size=way.at_once,
            predictor=forward,
            overlap=overlap,
            mode="gaussian",
            sigma_scale=_BLEND,
            padding_mode="replicate",
            sw_device=device,
            device=way.joined if _has_room(way.joined, volume.numel()) else _CPU,
        )
        assert isinstance(logits, torch.Tensor) and logits.shape[1] == CLASSES
        return logits[0].to(_CPU)


def _mean_over_flips(
    network: nn.Module, windows: torch.Tensor, flips: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Run windows `[B, 1, x, y, z]`, mirrored along each set of the axes and back."""
    kind = windows.device
    turns = [turn for n in range(len(flips) + 1) for turn in itertools.combinations(flips, n)]
    total: torch.Tensor | None = None
    for turn in turns:
        axes = [axis + 2 for axis in turn]
        image = torch.flip(windows, axes).contiguous(memory_format=memory_format(kind))
        with torch.autocast(kind.type, dtype=dtype, enabled=dtype != torch.float32):
            logits: torch.Tensor = network(image)
        logits = torch.flip(logits.float(), axes) if axes else logits.float()
        total = logits if total is None else total + logits
    assert total is not None
    return total / len(turns) if flips else total


def _has_room(device: torch.device, voxels: int) -> bool:
    """Tell whether sums of logits and weights, and as much again, fit into a GPU."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * 4 * (CLASSES + 1) * voxels < free


def _window_count(shape: Sequence[int], window: Sequence[int], overlap: Sequence[float]) -> int:
    """Count the windows that MONAI lays."""
    padded = [max(n, side) for n, side in zip(shape, window, strict=True)]
    steps = [max(1, int(side * (1 - part))) for side, part in zip(window, overlap, strict=True)]
    return len(dense_patch_slices(padded, window, steps, return_slice=False))


def _overlap(size: int, window: int) -> float:
    """Overlap that spaces windows evenly, and at most half a window apart, along an axis.

    MONAI steps by a fixed share of the window and pushes the last one back inside: most of its
    border then lies where others overlap it anyway, and the seam before it in the middle of the
    volume.
    """
    left = max(size - window, 0)
    gaps = max(1, math.ceil(left / max(1, window // 2)))
    step = max(1, math.ceil(left / gaps))
    return max(0.0, 1 - (step + 0.5) / window)  # MONAI rounds the step down


def predict_labels(
    network: nn.Module,
    scan: Volume,
    plan: Plan,
    *,
    device: torch.device,
    modality: Modality = "auto",
    precision: str = "auto",
    flips: Sequence[int] = (),
    ways: list[Way] | None = None,
    on_windows: OnWindows | None = None,
) -> np.ndarray:
    """Predict labels uint8 `[X, Y, Z]` in the scan's own grid, in RAS axis order.

    Args:
        network: The network; it is moved.
        scan: The scan.
        plan: The plan.
        device: Where to begin.
        modality: What the scan is.
        precision: Number format, see `training.choose_dtype`.
        flips: As in `predict_logits`.
        ways: As in `predict_logits`.
        on_windows: As in `predict_logits`.

    Raises:
        CaseError: The plan's spacing would make the scan too large.
        ModelError: There is no memory for it.
    """
    prepared = prepare(scan, plan, modality=modality)
    logits = predict_logits(
        network,
        prepared.image,
        plan,
        device=device,
        precision=precision,
        flips=flips,
        ways=ways,
        on_windows=on_windows,
    )
    return restore(logits, prepared.placement)
