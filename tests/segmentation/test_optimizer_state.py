"""Moments come back just as they were: training goes on as if the process had never ended."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedseg.sections import TrainConfig
from fedseg.segmentation.optimizer_state import load_optimizer, save_optimizer
from fedseg.segmentation.training import make_optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 3, 3))
    # As at a site: in this format the restored moments must lie as the weights do.
    return made.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def step(trained: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    image = torch.randn(1, 2, 7, 7, 7, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    trained(image).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_going_on_from_disk_changes_no_bit(name: str, tmp_path: Path) -> None:
    config = TrainConfig.model_validate({"optimizer": name, "learning_rate": 0.05})
    whole, broken = network(), network()
    kept = make_optimizer(whole, config)
    for seed in range(6):
        step(whole, kept, seed)
    for number, seeds in enumerate((range(3), range(3, 6)), 1):
        optimizer = make_optimizer(broken, config)
        assert load_optimizer(optimizer, tmp_path / f"round-{number - 1}") == (number > 1)
        for seed in seeds:
            step(broken, optimizer, seed)
        save_optimizer(optimizer, tmp_path / f"round-{number}")
    for one, other in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)


def test_moments_of_another_network_are_left_alone(tmp_path: Path) -> None:
    config = TrainConfig()
    trained = network()
    optimizer = make_optimizer(trained, config)
    step(trained, optimizer, 0)
    save_optimizer(optimizer, tmp_path / "round-1")
    small = nn.Conv3d(2, 4, 3)
    assert not load_optimizer(make_optimizer(small, config), tmp_path / "round-1")
