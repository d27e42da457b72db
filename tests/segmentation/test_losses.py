"""Tests of the losses: a contract for every registered one, and dice-ce by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedseg.segmentation.losses import LOSSES, dice_ce

BOTH = ("liver", "tumor")


def batch(seed: int = 0, *, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, 3, 5, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (size, 5, 6, 7), generator=generator)
    return logits, labels


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("annotated", [BOTH, ("liver",)])
def test_finite_scalar_with_gradient_for_any_labels(name: str, annotated: tuple[str, ...]) -> None:
    for highest in (0, 1, 2):
        logits = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
        loss = LOSSES[name](logits, torch.full((2, 4, 4, 4), highest), annotated)
        assert loss.shape == ()
        loss.backward()
        assert torch.isfinite(loss)
        assert logits.grad is not None and torch.isfinite(logits.grad).all()
        assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_better_prediction_costs_less(name: str) -> None:
    _, labels = batch()
    truth = functional.one_hot(labels, 3).movedim(-1, 1).float()
    right, blank, wrong = (
        LOSSES[name](x, labels, BOTH) for x in (9 * truth, 0 * truth, -9 * truth)
    )
    assert right < blank < wrong
    assert right == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("name", LOSSES)
def test_batch_costs_the_mean_of_its_samples(name: str) -> None:
    logits, labels = batch(size=3)
    alone = [LOSSES[name](logits[i : i + 1], labels[i : i + 1], BOTH) for i in range(3)]
    assert torch.allclose(LOSSES[name](logits, labels, BOTH), torch.stack(alone).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_of_half_precision_stay_finite(name: str) -> None:
    logits = torch.full((1, 3, 4, 4, 4), -1e4, dtype=torch.bfloat16)
    logits[:, 1] = 1e4
    loss = LOSSES[name](logits, torch.zeros(1, 4, 4, 4, dtype=torch.long), BOTH)
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32


def test_dice_ce_by_hand() -> None:
    logits, labels = batch()
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    t = np.stack([labels.numpy() == c for c in range(3)], 1)
    entropy = -np.log((p * t).sum(1)).mean()
    dices = [
        (2 * (p[b, c] * t[b, c]).sum() + 1) / (p[b, c].sum() + t[b, c].sum() + 1)
        for b in range(2)
        for c in (1, 2)
    ]
    expected = 1 - np.mean(dices) + entropy
    assert dice_ce(logits, labels, BOTH).item() == pytest.approx(expected, abs=1e-9)


def test_gradient_is_that_of_finite_differences() -> None:
    logits, labels = batch(size=1)
    small, few = logits[..., :2, :2, :2].clone().requires_grad_(), labels[..., :2, :2, :2]
    for annotated in (BOTH, ("liver",)):
        assert torch.autograd.gradcheck(lambda x, a=annotated: dice_ce(x, few, a), (small,))


def test_liver_only_site_does_not_say_which_liver_voxel_is_tumour() -> None:
    logits, labels = batch()
    labels = labels.clamp(max=1)
    merged = torch.stack([logits[:, 0], torch.logsumexp(logits[:, 1:], 1)], 1)
    loss = dice_ce(logits, labels, ("liver",))
    two_classes = functional.cross_entropy(merged, labels)
    p, t = merged.softmax(1)[:, 1], (labels == 1).double()
    dice = (2 * (p * t).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + t.sum((1, 2, 3)) + 1)
    assert loss.item() == pytest.approx((1 - dice.mean() + two_classes).item(), abs=1e-9)
    # Moving probability between liver and tumour changes nothing; with tumour annotated it does.
    swapped = logits[:, [0, 2, 1]]
    assert torch.allclose(dice_ce(swapped, labels, ("liver",)), loss)
    assert not torch.allclose(dice_ce(swapped, labels, BOTH), dice_ce(logits, labels, BOTH))
    # A tumour label that such a site has all the same counts as liver.
    marked = torch.where(labels == 1, 2, 0)
    assert torch.allclose(dice_ce(logits, marked, ("liver",)), loss)
