"""Tests of finding a label's rows: moved alone, they move that label's logits and no other's."""

import pytest
import torch
from torch import nn
from updates import study

from fedseg.config import StudyConfig
from fedseg.data.plan import CLASSES, Plan
from fedseg.data.planning import make_plan
from fedseg.federation.flat import flatten, layout_of, unflatten
from fedseg.federation.head import head_rows, tumor_rows
from fedseg.segmentation.models import MODELS, build_model
from fedseg.segmentation.sharing import head_names, split_state


def plan_of(model: str) -> Plan:
    keys = {
        "model.name": model,
        "model.width": 4,
        "model.depth": 5 if model == "unet++" else 3,
        "train.patch-size": "32,32,32",
    }
    return make_plan(StudyConfig.from_run_config(keys))


def moved_labels(network: nn.Module, rows: list[tuple[int, int]], image: torch.Tensor) -> list[int]:
    """Labels whose logits change when the rows do."""
    state = split_state(network).shared
    layout = layout_of(state)
    vector = flatten(state, layout)
    network.eval()
    with torch.inference_mode():
        before = network(image)
        for start, stop in rows:
            vector[start:stop] += 1
        network.load_state_dict(unflatten(vector, layout), strict=False)
        after = network(image)
    return [label for label in range(CLASSES) if not torch.equal(before[:, label], after[:, label])]


def noise(side: int) -> torch.Tensor:
    return torch.randn(1, 1, side, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", MODELS)
def test_rows_are_those_of_one_label_in_the_last_layer(model: str) -> None:
    plan = plan_of(model)
    network = build_model(plan, seed=0)
    layout = layout_of(split_state(network).shared)
    found = head_rows(network, layout, plan)
    values = [{v for span in rows for v in range(*span)} for rows in found]
    spans = [layout.spans()[name] for name in head_names(network)]
    assert set.union(*values) == {v for span in spans for v in range(*span)}
    assert sum(map(len, values)) == len(set.union(*values))
    assert moved_labels(network, found[2], noise(2**plan.depth)) == [2]


class Transposed(nn.Module):
    """A head that is a transposed convolution, with a tensor before it of as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ConvTranspose3d(CLASSES, CLASSES, 2, stride=2)  # defined first, used last
        self.body = nn.Conv3d(1, CLASSES, 3, padding=1, stride=2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.body(image)))
        return logits


def test_rows_of_a_transposed_convolution_wherever_it_is_defined() -> None:
    network, plan = Transposed().train(), plan_of("unet")
    layout = layout_of(network.state_dict())
    rows = head_rows(network, layout, plan)[2]
    marks = torch.zeros(layout.size, dtype=torch.bool)
    for start, stop in rows:
        marks[start:stop] = True
    found = unflatten(marks.float(), layout)
    assert found["head.weight"][:, 2].all() and found["head.bias"][2] == 1
    assert sum(float(part.sum()) for part in found.values()) == CLASSES * 8 + 1
    assert moved_labels(network, rows, noise(8)) == [2]
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_is_left_as_it_was() -> None:
    network, plan = build_model(plan_of("unet"), seed=0).train(), plan_of("unet")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    head_rows(network, layout_of(before), plan)
    assert network.training
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())


class Mixed(nn.Module):
    """Logits mixed by a softmax: no row belongs to one label alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv3d(1, CLASSES, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(image).log_softmax(1)  # type: ignore[no-any-return]


def test_no_rows_where_none_belongs_to_one_label() -> None:
    network = Mixed()
    assert head_rows(network, layout_of(network.state_dict()), plan_of("unet")) == [[], [], []]


@pytest.mark.parametrize(
    ("weighting", "shared", "some"),
    [
        ("annotated", "all", True),
        ("annotated", "all-but-norm", True),
        ("annotated", "all-but-head", False),
        ("cases", "all", False),
    ],
)
def test_rows_of_tumour_in_what_is_shared(weighting: str, shared: str, some: bool) -> None:
    plan = plan_of("unet")
    network = build_model(plan, seed=0)
    rows = tumor_rows(study(weighting=weighting, shared=shared), network, plan)
    assert bool(rows) == some
    if some:
        layout = layout_of(split_state(network, shared).shared)
        assert rows == head_rows(network, layout, plan)[2]
