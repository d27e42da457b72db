"""Score a network on whole volumes in their own grid."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedseg.data.cache import CachedCase
from fedseg.data.plan import Plan
from fedseg.data.preprocess import restore
from fedseg.segmentation.inference import predict_logits
from fedseg.segmentation.metrics import add, sums_of_case

__all__ = ["evaluate_cases"]


def evaluate_cases(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    *,
    device: torch.device,
    precision: str = "auto",
    annotated: Sequence[str] = ("liver", "tumor"),
    on_case: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Predict each case by sliding window and sum up its metrics.

    Returns:
        Sums and counts, see `metrics.sums_of_case`.
    """
    parts = []
    for number, case in enumerate(cases, 1):
        logits = predict_logits(network, case.image, plan, device=device, precision=precision)
        parts.append(sums_of_case(restore(logits, case.placement), case.truth, annotated=annotated))
        if on_case:
            on_case(number)
    return add(parts)
