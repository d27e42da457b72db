"""Pictures of held-out cases: the median and the worst by mean Dice, mask against prediction."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedseg.data.cache import CachedCase
from fedseg.data.plan import REGIONS, Plan
from fedseg.report.run import Picture, Scores
from fedseg.segmentation.inference import predict_logits
from fedseg.segmentation.overlay import axial_slice, draw_overlay

__all__ = ["draw_pictures", "save_pictures"]

_WINDOW = (-2.0, 2.0)
"""A prepared image is within these: the ends of the plan's window."""


def draw_pictures(
    network: nn.Module,
    cases: Sequence[CachedCase],
    scored: Sequence[Mapping[str, float]],
    plan: Plan,
    *,
    device: torch.device,
    precision: str = "auto",
    annotated: Sequence[str] = tuple(REGIONS),
) -> list[Picture]:
    """Draw two of some scored cases, at the network's resolution.

    Args:
        network: The network.
        cases: All cases; no name of one is in a picture.
        scored: Sums of each, see `evaluation.score_cases`.
        plan: The plan.
        device: Where to predict.
        precision: As in `predict_logits`.
        annotated: Regions that the masks hold; no other is drawn.

    Returns:
        The median and the worst case by mean Dice; one picture if there is one case.
    """
    found = [
        {
            region: sums[f"{region}.dice.sum"]
            for region in REGIONS
            if sums.get(f"{region}.dice.count")
        }
        for sums in scored
    ]
    pictures = []
    for title, index in _chosen(found).items():
        case = cases[index]
        logits = predict_logits(network, case.image, plan, device=device, precision=precision)
        labels, truth = logits.argmax(0).numpy(), np.asarray(case.labels)
        if "tumor" not in annotated:
            labels, truth = labels.clip(max=1), truth.clip(max=1)
        at = axial_slice(labels, truth)
        scan, overlay = (
            draw_overlay(case.image, drawn, truth=mask, spacing=plan.spacing, window=_WINDOW, at=at)
            for drawn, mask in ((np.zeros_like(labels), None), (labels, truth))
        )
        case.release()
        name = f"case {index + 1} of {len(cases)}"
        pictures.append(
            Picture(title=title, case=name, scan=scan, overlay=overlay, dice=found[index])
        )
    return pictures


def _chosen(found: Sequence[Scores]) -> dict[str, int]:
    """Title to index of a case; those without any Dice count as neither."""
    means = {i: sum(dice.values()) / len(dice) for i, dice in enumerate(found) if dice}
    order = sorted(means, key=lambda i: (means[i], i))
    if not order:
        return {}
    if len(order) == 1:
        return {"The only case": order[0]}
    # Of an even number the worse of the two in the middle, but never the worst itself.
    return {"Median case": order[max(1, (len(order) - 1) // 2)], "Worst case": order[0]}


def save_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write pictures into a run's folder, where the report finds them.

    Raises:
        OSError: The disk is full or can't be written.
    """
    where = folder / "pictures"
    where.mkdir(exist_ok=True)
    listed: list[Mapping[str, object]] = []
    for number, picture in enumerate(pictures):
        names = {"scan": f"{number}-scan.png", "overlay": f"{number}-overlay.png"}
        (where / names["scan"]).write_bytes(picture.scan)
        (where / names["overlay"]).write_bytes(picture.overlay)
        listed.append(
            {"title": picture.title, "case": picture.case, "dice": dict(picture.dice), **names}
        )
    (where / "pictures.json").write_text(json.dumps({"pictures": listed}, indent=2) + "\n")
