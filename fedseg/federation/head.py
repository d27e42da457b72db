"""Find what of a network belongs to one label alone: its rows of the last layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.plan import CLASSES, REGIONS, Plan
from fedseg.federation.flat import Layout, layout_of
from fedseg.segmentation.models import MODELS
from fedseg.segmentation.sharing import split_state

__all__ = ["head_rows", "tumor_rows"]


def tumor_rows(study: StudyConfig, network: nn.Module, plan: Plan) -> list[tuple[int, int]]:
    """Rows of tumour in the shared parameters; none unless the weighting asks for them."""
    if study.federation.weighting != "annotated":
        return []
    layout = layout_of(split_state(network, study.federation.shared).shared)
    return head_rows(network, layout, plan)[REGIONS["tumor"]]


def head_rows(network: nn.Module, layout: Layout, plan: Plan) -> list[list[tuple[int, int]]]:
    """Find the values that move the logits of one label and no other's.

    Found by what the network does, not by how it is built: gradients tell which slices of a tensor
    a label's logits depend on. A tensor belongs to the head if one of its first two axes (output
    channels; a transposed convolution has them second) has a slice for each label, and each label's
    logits depend on its own slice alone.

    Args:
        network: The network; it is left as it was.
        layout: Layout of the shared parameters; those that stay local have no rows.
        plan: The plan, for a patch that fits the network.

    Returns:
        For each label ranges `[start, stop)` of the flat vector, in order; none where no tensor
        qualifies.
    """
    names, gradients = _gradients(network, plan)
    spans = layout.spans()
    rows: list[list[tuple[int, int]]] = [[] for _ in range(CLASSES)]
    for index, name in enumerate(names):
        axis = _label_axis([parts[index] for parts in gradients])
        if axis is None or name not in spans:
            continue
        for label in range(CLASSES):
            marks = torch.zeros(layout.shapes[name], dtype=torch.bool)
            marks.select(axis, label).fill_(True)
            start = spans[name][0]
            rows[label] += [(start + low, start + high) for low, high in _runs(marks.reshape(-1))]
    return [sorted(ranges) for ranges in rows]


def _gradients(
    network: nn.Module, plan: Plan
) -> tuple[list[str], list[Sequence[torch.Tensor | None]]]:
    """Gradients of each label's logits on a patch of noise, for each parameter."""
    side = 2**plan.depth
    size = (side, side, side) if plan.model in MODELS else plan.patch_size
    named = dict(network.named_parameters())
    device = next(iter(named.values())).device
    training = network.training
    noise = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        logits = network.eval()(torch.randn(1, 1, *size, generator=noise).to(device))
        gradients = [
            torch.autograd.grad(
                logits[:, label].sum(),
                list(named.values()),
                retain_graph=label < CLASSES - 1,
                allow_unused=True,
            )
            for label in range(CLASSES)
        ]
    network.train(training)
    return list(named), [list(parts) for parts in gradients]


def _label_axis(gradients: Sequence[torch.Tensor | None]) -> int | None:
    """Axis along which each label's gradient is in its own slice alone."""
    for axis in range(2):
        if all(
            part is not None and part.dim() > axis and part.shape[axis] == CLASSES
            for part in gradients
        ):
            moved = [_moved(part, axis) for part in gradients if part is not None]
            if torch.equal(torch.stack(moved), torch.eye(CLASSES, dtype=torch.bool)):
                return axis
    return None


def _moved(gradient: torch.Tensor, axis: int) -> torch.Tensor:
    """Which slices along an axis have a gradient, `[CLASSES]`."""
    slices = gradient.cpu().movedim(axis, 0).reshape(CLASSES, -1)
    return (slices != 0).any(dim=1)


def _runs(marks: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of True in a flat mask."""
    edges = torch.diff(marks.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, stops = (edges > 0).nonzero().ravel(), (edges < 0).nonzero().ravel()
    yield from zip(starts.tolist(), stops.tolist(), strict=True)
