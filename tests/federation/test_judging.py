"""Tests of the judgement of one round's updates, against cosines worked out from the updates."""

import numpy as np
import pytest
import torch

from fedseg.errors import Reason
from fedseg.federation.judging import Verdict, judge


def products(updates: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(updates @ updates.T)


def names_of(updates: np.ndarray) -> list[str]:
    return [f"site-{n:02d}" for n in range(len(updates))]


def judged(
    updates: np.ndarray, *, norm_factor: float = 10.0, opposition: float = 1.0, **more: object
) -> dict[str, Verdict]:
    names = names_of(updates)
    return judge(products(updates), names, norm_factor=norm_factor, opposition=opposition, **more)  # type: ignore[arg-type]


def bad(verdicts: dict[str, Verdict]) -> dict[str, Reason]:
    return {name: v.reason for name, v in verdicts.items() if v.reason is not None}


def honest(sites: int, seed: int, *, cosine: float = 0.2, size: int = 2000) -> np.ndarray:
    """Updates with about this cosine between any two, and norms between 0.3 and 1.5."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(size)
    own = rng.standard_normal((sites, size))
    updates = np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own
    updates *= rng.uniform(0.3, 1.5, (sites, 1)) / np.linalg.norm(updates, axis=1, keepdims=True)
    return updates


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def cut(updates: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    return updates * np.minimum(1, np.median(norms) / norms)


@pytest.mark.parametrize("sites", [4, 5, 12])
def test_norms_and_cosines_are_those_of_the_updates(sites: int) -> None:
    updates = honest(sites, seed=sites)
    verdicts = judged(updates)
    norms = np.linalg.norm(updates, axis=1)
    shortened = cut(updates)
    for i, name in enumerate(names_of(updates)):
        others = np.delete(shortened, i, 0)
        expected = cosine(updates[i], others.mean(0))
        among = [cosine(v, np.delete(others, j, 0).mean(0)) for j, v in enumerate(others)]
        assert verdicts[name].norm == pytest.approx(norms[i] / np.median(norms))
        assert verdicts[name].cosine == pytest.approx(expected)
        agreement = np.clip(expected / np.median(among), -1, 1)
        assert verdicts[name].agreement == pytest.approx(agreement)
    assert not bad(verdicts)


def test_three_sites_count_half() -> None:
    updates = honest(3, seed=0, cosine=0.3)
    updates[1] *= -1
    verdicts = judged(updates)
    first, second, third = cut(updates)
    expected = cosine(second, first + third)
    assert verdicts["site-01"].cosine == pytest.approx(expected)
    clipped = max(expected / cosine(first, third), -1)
    assert verdicts["site-01"].agreement == pytest.approx(0.5 * clipped)
    # The two others don't agree with each other where one of them is the bad one.
    assert verdicts["site-00"].agreement == verdicts["site-02"].agreement == 0


@pytest.mark.parametrize("sites", [3, 5, 20])
@pytest.mark.parametrize("seed", range(5))
def test_huge_and_zero_updates_are_left_out_at_once(sites: int, seed: int) -> None:
    updates = honest(sites + 2, seed)
    updates[0] *= 100 / np.linalg.norm(updates[0])
    updates[-1] = 0
    expected = {"site-00": Reason.UPDATE_NORM, names_of(updates)[-1]: Reason.ZERO_UPDATE}
    assert bad(judged(updates)) == expected


@pytest.mark.parametrize("sites", [4, 5, 20])
@pytest.mark.parametrize("scale", [-1, -4])
def test_an_opposite_update_stands_alone(sites: int, scale: float) -> None:
    for seed in range(20):
        updates = honest(sites, seed)
        updates[2] *= scale
        verdicts = judged(updates, opposition=0.7)
        assert bad(verdicts) == {"site-02": Reason.UPDATE_DIRECTION}, seed
        assert judged(updates, opposition=0)["site-02"].cosine is None


def test_a_huge_update_does_not_turn_the_mean() -> None:
    updates = honest(5, seed=3)
    straight = judged(updates)
    updates[0] *= 100
    for name, verdict in judged(updates, norm_factor=1e6).items():
        assert verdict.reason is None
        assert verdict.cosine == pytest.approx(straight[name].cosine, abs=0.05)


def test_credit_outweighs_opposition() -> None:
    updates = honest(5, seed=1)
    updates[2] *= -1
    credit = {name: 0.0 for name in names_of(updates)}
    assert "site-02" in bad(judged(updates, credit=credit))
    assert not bad(judged(updates, credit={**credit, "site-02": 0.5}))


def test_a_cosine_counts_only_while_the_others_agree() -> None:
    updates = honest(6, seed=8)
    updates[3] *= -1
    usual = judged(updates)
    among = judged(np.delete(updates, 3, 0))
    median = float(np.median([v.cosine for v in among.values()]))  # type: ignore[misc]
    assert usual["site-03"].agreement < -0.5
    assert judged(updates, agreed=0.8 * median)["site-03"].agreement < -0.5
    later = judged(updates, agreed=1.2 * median)
    assert later["site-03"].agreement == 0
    assert later["site-03"].cosine == usual["site-03"].cosine


def test_where_nobody_agrees_nobody_opposes() -> None:
    """Differences that add up to nothing: what is left once all is learnt that is common."""
    rng = np.random.default_rng(0)
    updates = rng.standard_normal((5, 300))
    updates -= updates.mean(0)
    verdicts = judged(updates, opposition=0.1)
    assert all(v.cosine is not None and v.cosine < -0.9 for v in verdicts.values())
    assert not bad(verdicts)


@pytest.mark.parametrize("sites", [2, 3, 4, 5, 6, 9])
def test_at_most_a_minority_is_left_out_for_direction(sites: int) -> None:
    rng = np.random.default_rng(sites)
    for _ in range(50):
        updates = honest(sites, int(rng.integers(10**6)))
        updates *= rng.choice([-1, 1], (sites, 1))
        assert len(bad(judged(updates, opposition=0.01))) < sites / 2


def test_of_two_sites_nobody_can_say_which_is_wrong() -> None:
    updates = honest(2, seed=0)
    updates[1] *= -1000
    assert not bad(judged(updates, opposition=0.01))
    updates[1] = 0
    assert bad(judged(updates)) == {"site-01": Reason.ZERO_UPDATE}
    assert bad(judged(updates[1:])) == {"site-00": Reason.ZERO_UPDATE}


def test_order_and_unit_do_not_matter() -> None:
    updates = honest(7, seed=5)
    updates[1] *= -1
    updates[4] *= 200
    updates[6] = 0
    names = names_of(updates)
    rng = np.random.default_rng(0)
    first = judge(products(updates), names, norm_factor=10, opposition=0.7)
    assert len(bad(first)) == 3
    for _ in range(10):
        order = rng.permutation(len(names))
        again = judge(
            products(updates)[np.ix_(order, order)],
            [names[i] for i in order],
            norm_factor=10,
            opposition=0.7,
        )
        assert again == first  # the same bits
    scaled = judge(products(1024 * updates), names, norm_factor=10, opposition=0.7)
    assert scaled == first


def test_suspects_are_judged_but_have_no_say() -> None:
    updates = honest(6, seed=2)
    updates[0] *= -1
    updates[1] *= -3
    outside = ("site-00", "site-01", "site-02")
    verdicts = judged(updates, suspects=outside)
    assert set(bad(verdicts)) == {"site-00", "site-01"}
    alone = judge(products(updates[3:]), names_of(updates)[3:], norm_factor=10, opposition=1.0)
    for name in names_of(updates)[3:]:
        assert verdicts[name].cosine == alone[name].cosine
    assert verdicts["site-02"].agreement > 0


def test_what_is_known_to_be_bad_is_not_judged() -> None:
    updates = honest(5, seed=4)
    verdicts = judged(updates, found={"site-03": Reason.UPDATE_PROBE})
    assert bad(verdicts) == {"site-03": Reason.UPDATE_PROBE}
    assert verdicts["site-03"].cosine is None


def test_any_finite_float32_can_be_judged() -> None:
    updates = honest(5, seed=6)
    updates[0] *= 1e38
    assert bad(judged(updates)) == {"site-00": Reason.UPDATE_NORM}
    assert not bad(judged(honest(5, seed=6) * 1e-30))
