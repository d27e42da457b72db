"""Predict a whole volume by sliding window."""

import logging
import math

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from fedseg.data.plan import CLASSES, Plan
from fedseg.data.preprocess import Modality, prepare, restore
from fedseg.data.volumes import Volume
from fedseg.errors import ModelError
from fedseg.segmentation.training import choose_dtype

__all__ = ["predict_labels", "predict_logits"]

log = logging.getLogger(__name__)

_BLEND = 0.25
"""Standard deviation of a window's weight, as a share of its side. MONAI's .125 hardly blends."""

_AT_ONCE = 4
"""Windows a forward pass; with one, oneDNN falls back to code 3 times slower in fp32."""


def predict_logits(
    network: nn.Module,
    image: np.ndarray,
    plan: Plan,
    *,
    device: torch.device,
    precision: str = "auto",
) -> torch.Tensor:
    """Predict logits float32 `[C, x, y, z]` on the CPU for a prepared image `[x, y, z]`.

    A device that runs out of memory gets one window at a time, then windows no larger than in
    training.

    Raises:
        ModelError: Not even those fit.
    """
    dtype = choose_dtype(precision, device)
    network.to(device).eval()
    volume = torch.from_numpy(np.asarray(image, np.float32))[None, None]
    wanted = plan.inference_patch
    for window, at_once in ((wanted, _AT_ONCE), (wanted, 1), (plan.patch_size, 1)):
        try:
            return _slide(network, volume, window, at_once, device, dtype)
        except torch.OutOfMemoryError:
            log.warning("%s: no memory for %d windows of %s at once", device, at_once, window)
    raise ModelError(f"{device}: no memory for one window of {window} voxels; take device cpu")


def _slide(
    network: nn.Module,
    volume: torch.Tensor,
    window: tuple[int, int, int],
    at_once: int,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    def forward(windows: torch.Tensor) -> torch.Tensor:
        windows = windows.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits: torch.Tensor = network(windows)
        return logits.float()

    with torch.inference_mode():
        logits = sliding_window_inference(
            volume,
            roi_size=window,
            sw_batch_size=at_once,
            predictor=forward,
            overlap=[_overlap(n, side) for n, side in zip(volume.shape[2:], window, strict=True)],
            mode="gaussian",
            sigma_scale=_BLEND,
            padding_mode="replicate",
            sw_device=device,
            device=torch.device("cpu"),
        )
    assert isinstance(logits, torch.Tensor) and logits.shape[1] == CLASSES
    return logits[0]


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
) -> np.ndarray:
    """Predict labels uint8 `[X, Y, Z]` in the scan's own grid, in RAS axis order.

    Raises:
        CaseError: The plan's spacing would make the scan too large.
        ModelError: The device has no memory for one window.
    """
    prepared = prepare(scan, plan, modality=modality)
    logits = predict_logits(network, prepared.image, plan, device=device, precision=precision)
    return restore(logits, prepared.placement)
