"""Predict a whole volume by sliding window."""

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from fedseg.data.plan import CLASSES, Plan
from fedseg.data.preprocess import Modality, prepare, restore
from fedseg.data.volumes import Volume
from fedseg.segmentation.training import choose_dtype

__all__ = ["predict_labels", "predict_logits"]


def predict_logits(
    network: nn.Module,
    image: np.ndarray,
    plan: Plan,
    *,
    device: torch.device,
    precision: str = "auto",
    overlap: float = 0.25,
) -> torch.Tensor:
    """Predict logits float32 `[C, x, y, z]` on the CPU for a prepared image `[x, y, z]`."""
    dtype = choose_dtype(precision, device)
    network.to(device).eval()
    volume = torch.from_numpy(np.asarray(image, np.float32))[None, None]

    def forward(window: torch.Tensor) -> torch.Tensor:
        window = window.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits: torch.Tensor = network(window)
        return logits.float()

    with torch.inference_mode():
        logits = sliding_window_inference(
            volume,
            roi_size=plan.inference_patch,
            sw_batch_size=2,
            predictor=forward,
            overlap=overlap,
            mode="gaussian",
            padding_mode="replicate",
            sw_device=device,
            device=torch.device("cpu"),
        )
    assert isinstance(logits, torch.Tensor) and logits.shape[1] == CLASSES
    return logits[0]


def predict_labels(
    network: nn.Module,
    scan: Volume,
    plan: Plan,
    *,
    device: torch.device,
    modality: Modality = "auto",
    precision: str = "auto",
) -> np.ndarray:
    """Predict labels uint8 `[X, Y, Z]` in the scan's own grid, in RAS axis order."""
    prepared = prepare(scan, plan, modality=modality)
    logits = predict_logits(network, prepared.image, plan, device=device, precision=precision)
    return restore(logits, prepared.placement)
