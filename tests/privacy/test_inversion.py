"""Tests of gradient inversion: an analytic oracle, and noise that it can't get through."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.privacy.inversion import (
    guess_from_labels,
    invert,
    likeness,
    segmentation_loss,
    step_update,
)
from fedseg.segmentation.losses import dice_ce


def blob(side: int = 8, seed: int = 0) -> torch.Tensor:
    """A smooth patch `[1, 1, x, y, z]` within -2 and 2."""
    axis = torch.linspace(-1, 1, side)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    centre = torch.rand(3, generator=torch.Generator().manual_seed(seed)) - 0.5
    distance = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
    return (3 * torch.exp(-4 * distance) - 1.5)[None, None]


class OneLayer(nn.Module):
    """A layer that sees all voxels at once: its gradient is a multiple of the patch itself."""

    def __init__(self, voxels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(voxels, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


def logistic(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long))


def test_one_layer_shows_its_patch_nearly_exactly() -> None:
    """Oracle: of a linear layer with bias, weight gradient / bias gradient is the input."""
    truth, network = 0.2 * blob(4), OneLayer(64)
    update = step_update(network, logistic, truth, learning_rate=0.1)
    oracle = torch.from_numpy(update[: 4 * 64].reshape(4, 64)[0] / update[4 * 64])
    assert torch.allclose(oracle, truth.flatten(), atol=1e-3)
    found = invert(network, logistic, update, shape=truth.shape, iterations=500, seed=0, smooth=0.0)
    assert float((found - truth).norm() / truth.norm()) < 0.01
    assert likeness(found[0, 0], truth[0, 0]).ssim > 0.99


def segmenter() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv3d(16, 3, 3, padding=1))


def test_noise_takes_a_patch_below_the_guess_from_its_labels() -> None:
    truth = blob()
    labels = (truth[:, 0] > 0).long() + (truth[:, 0] > 1).long()
    network, loss = segmenter(), segmentation_loss(dice_ce, labels, [("liver", "tumor")])
    update = step_update(network, loss, truth, learning_rate=1.0)
    noise = np.random.default_rng(0).normal(0, np.linalg.norm(update), update.size)
    attack = functools.partial(invert, network, loss, shape=truth.shape, iterations=120, seed=0)
    clear, noisy = attack(update), attack((update + noise).astype(np.float32))
    guess = likeness(guess_from_labels(labels, truth, labels[0]), truth[0, 0])
    # Intensities of the patch itself make the guess as good as one of labels can be.
    assert likeness(noisy[0, 0], truth[0, 0]).psnr < guess.psnr - 3
    assert likeness(clear[0, 0], truth[0, 0]).psnr > likeness(noisy[0, 0], truth[0, 0]).psnr + 3


def test_a_scaled_update_gives_the_same_patch() -> None:
    """Clipping alone is no protection: the cosine doesn't know an update's length."""
    truth, network = blob(6), OneLayer(216)
    update = step_update(network, logistic, truth, learning_rate=0.1)
    one, other = (
        invert(network, logistic, scale * update, shape=truth.shape, iterations=20, seed=3)
        for scale in (1.0, 0.125)
    )
    assert torch.allclose(one, other, atol=1e-4)


def test_inversion_repeats_itself_by_seed() -> None:
    truth, network = blob(6), OneLayer(216)
    update = step_update(network, logistic, truth, learning_rate=0.1)
    attack = functools.partial(invert, network, logistic, update, shape=truth.shape, iterations=5)
    assert torch.equal(attack(seed=1), attack(seed=1))
    assert not torch.equal(attack(seed=1), attack(seed=2))
    before = [p.clone() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(p.grad is None for p in network.parameters())


def test_loss_of_patches_is_the_mean_of_each_under_its_own_regions() -> None:
    images = torch.cat([blob(6, seed) for seed in (0, 1)])
    labels = torch.randint(0, 3, (2, 6, 6, 6), generator=torch.Generator().manual_seed(0))
    regions = [("liver", "tumor"), ("liver",)]
    network = segmenter()
    both = segmentation_loss(dice_ce, labels, regions)(network, images)
    apart = [
        segmentation_loss(dice_ce, labels[i : i + 1], [regions[i]])(network, images[i : i + 1])
        for i in range(2)
    ]
    assert torch.allclose(both, torch.stack(apart).mean(), rtol=1e-5)
    updates = [
        step_update(
            network,
            segmentation_loss(dice_ce, labels[i : i + 1], [regions[i]]),
            images[i : i + 1],
            learning_rate=0.5,
        )
        for i in range(2)
    ]
    joint = step_update(
        network, segmentation_loss(dice_ce, labels, regions), images, learning_rate=0.5
    )
    assert np.allclose(joint, np.mean(updates, axis=0), atol=1e-6)


def test_likeness() -> None:
    truth = blob()[0, 0]
    same = likeness(truth, truth)
    assert same.ssim == pytest.approx(1)
    assert same.psnr > 100
    shifted = likeness(truth + 0.4, truth)
    assert shifted.psnr == pytest.approx(20 * np.log10(4 / 0.4), abs=1e-3)  # the range is 4
    assert shifted.ssim < 1


def test_guess_from_labels_paints_mean_intensities() -> None:
    labels = torch.tensor([0, 0, 1, 1]).reshape(1, 4, 1, 1)
    images = torch.tensor([1.0, 3.0, -1.0, -2.0]).reshape(1, 1, 4, 1, 1)
    known = torch.tensor([1, 0, 2]).reshape(3, 1, 1)
    guess = guess_from_labels(labels, images, known).flatten().tolist()
    assert guess == [-1.5, 2.0, 0.25]  # a label never seen gets the mean of all
