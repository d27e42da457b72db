"""Tests of membership inference: the measure on known numbers, the attacks on networks."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedseg.privacy.membership import (
    Candidate,
    alignment,
    case_gradient,
    case_loss,
    separation,
)
from fedseg.segmentation.losses import dice_ce

BOTH = ("liver", "tumor")


def test_separation_is_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.7, 1, 40).round(1), rng.normal(0, 1, 30).round(1)
    found = separation([members.tolist()], [others.tolist()])
    statistic = stats.mannwhitneyu(members, others).statistic
    assert found.auc == pytest.approx(statistic / (40 * 30))
    assert found.low < found.auc < found.high


def test_separation_of_disjoint_and_of_equal_scores() -> None:
    sure = separation([[2.0, 3.0]], [[0.0, 1.0]])
    assert (sure.auc, sure.low, sure.high) == (1, 1, 1)
    nothing = separation([[1.0, 1.0]], [[1.0, 1.0]])
    assert (nothing.auc, nothing.low, nothing.high) == (0.5, 0.5, 0.5)


def test_a_difference_between_sites_is_no_membership() -> None:
    """Members of one site score far above everything of the other, and still tell nothing."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(0, 1, (2, 200)), rng.normal(100, 1, (2, 200))
    uneven = separation(
        [first[0].tolist()[:5], second[0].tolist()], [first[1].tolist(), second[1].tolist()]
    )
    pooled = stats.mannwhitneyu([*first[0][:5], *second[0]], [*first[1], *second[1]]).statistic / (
        205 * 400
    )
    assert pooled > 0.6
    assert uneven.low < 0.5 < uneven.high


def test_interval_covers_the_true_value() -> None:
    rng = np.random.default_rng(2)
    truth = stats.norm.cdf(1 / np.sqrt(2))
    draws = [
        separation([rng.normal(1, 1, 25).tolist()], [rng.normal(0, 1, 25).tolist()], seed=i)
        for i in range(60)
    ]
    covered = sum(found.low <= truth <= found.high for found in draws)
    assert covered >= 50  # of 60 at 95%, and the percentile bootstrap is a little narrow


def test_undefined_scores_tell_nothing_and_empty_halves_are_refused() -> None:
    nan = float("nan")
    assert separation([[nan, nan]], [[nan, nan]]).auc == 0.5
    with pytest.raises(ValueError, match="members and non-members"):
        separation([[]], [[1.0]])


def test_alignment_is_a_cosine_with_the_negative_gradient() -> None:
    gradient = np.array([3.0, 4.0], np.float32)
    assert alignment(-0.1 * gradient, gradient) == pytest.approx(1)
    assert alignment(gradient, gradient) == pytest.approx(-1)
    assert alignment(np.zeros(2, np.float32), gradient) == 0


def tiny_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 3, 3, padding=1))


def drawn_cases(count: int, seed: int) -> list[Candidate]:
    """Cases of noise with labels of noise: nothing to learn but the cases themselves."""
    g = torch.Generator().manual_seed(seed)
    return [
        Candidate(
            image=torch.randn(1, 1, 6, 6, 6, generator=g),
            labels=torch.randint(0, 3, (1, 6, 6, 6), generator=g),
            annotated=BOTH,
        )
        for _ in range(count)
    ]


def aucs(network: nn.Module, update: np.ndarray, start: nn.Module) -> tuple[float, float]:
    """AUC of the attack on an update, and of the one on the model that it led to."""
    halves = [drawn_cases(12, 1), drawn_cases(12, 2)]
    aligned = [
        [alignment(update, case_gradient(start, case, dice_ce).numpy()) for case in half]
        for half in halves
    ]
    gained = [
        [
            float((case_loss(start, c, dice_ce) - case_loss(network, c, dice_ce)).detach())
            for c in half
        ]
        for half in halves
    ]
    return separation(aligned[:1], aligned[1:]).auc, separation(gained[:1], gained[1:]).auc


def weights(network: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()]).numpy().copy()


def test_an_overfitted_network_gives_its_cases_away() -> None:
    network, start = tiny_network(), tiny_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    members = drawn_cases(12, 1)
    for _ in range(40):
        optimizer.zero_grad()
        torch.stack([case_loss(network, case, dice_ce) for case in members]).mean().backward()
        optimizer.step()
    on_update, on_model = aucs(network, weights(network) - weights(start), start)
    assert on_update > 0.9
    assert on_model > 0.9


def test_an_untrained_network_tells_nothing() -> None:
    """Its "update" is noise, and so is the change of its losses: over networks the mean is .5."""
    found = []
    for seed in range(8):
        start, network = tiny_network(), tiny_network()
        noise = np.random.default_rng(seed).normal(0, 0.01, weights(start).size)
        vector = torch.from_numpy((weights(start) + noise).astype(np.float32))
        nn.utils.vector_to_parameters(vector, network.parameters())
        found.append(aucs(network, noise.astype(np.float32), start))
    means = np.mean(found, axis=0)
    # 12 against 12: one AUC has a standard deviation of .12, a mean of 8 at least .04.
    assert np.all(np.abs(means - 0.5) < 0.17)
