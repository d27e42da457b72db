"""Record-level privacy: what a whole case can change, what is drawn, and that training follows."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.planning import make_plan
from fedseg.data.preprocess import Placement
from fedseg.federation.record_training import unchanged_buffers
from fedseg.privacy.record_dp import (
    Batch,
    case_batches,
    clipped_sum,
    drawn_cases,
    noised_gradient,
)
from fedseg.sections import TrainConfig
from fedseg.segmentation.losses import LOSSES
from fedseg.segmentation.models import MODELS, build_model
from fedseg.segmentation.training import fit

CLIP = 0.01
KEY = bytes(range(32))


def a_network(name: str) -> nn.Module:
    depth, side = (5, 32) if name == "unet++" else (2, 16)
    study = StudyConfig.from_run_config(
        {
            "model.name": name,
            "model.width": 2,
            "model.depth": depth,
            "train.patch-size": f"{side},{side},{side}",
        }
    )
    return build_model(make_plan(study), seed=0).train()


def a_batch(seed: int, *, side: int, scale: float = 1.0) -> Batch:
    """Two patches of one case."""
    rng = torch.Generator().manual_seed(seed)
    image = scale * torch.randn(2, 1, side, side, side, generator=rng)
    return image, torch.randint(0, 3, (2, side, side, side), generator=rng)


def side_of(name: str) -> int:
    return 32 if name == "unet++" else 16


def loss_with(network: nn.Module):  # type: ignore[no-untyped-def]
    return lambda batch: LOSSES["dice-ce"](network(batch[0]), batch[1], ("liver", "tumor"))


def summed(network: nn.Module, batches: Sequence[Batch], clip: float = CLIP) -> torch.Tensor:
    parameters = list(network.parameters())
    total, _, _ = clipped_sum(batches, loss_with(network), parameters, clip=clip)
    return torch.cat([part.reshape(-1).double() for part in total])


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_case_more_or_less_moves_the_sum_by_the_clip_at_most(name: str) -> None:
    network, side = a_network(name), side_of(name)
    cases = [a_batch(seed, side=side, scale=10.0**seed) for seed in range(3)]
    whole = summed(network, cases)
    for left_out in range(3):
        rest = [case for index, case in enumerate(cases) if index != left_out]
        moved = float((whole - summed(network, rest)).norm())
        assert 0.99 * CLIP < moved <= CLIP  # every gradient is longer than the clip here
    # Another case in its place: all its patches change, and so at most twice the clip.
    other = [a_batch(99, side=side, scale=50.0), *cases[1:]]
    assert float((whole - summed(network, other)).norm()) <= 2 * CLIP


@pytest.mark.parametrize("name", MODELS)
def test_a_case_gives_the_gradient_of_all_its_patches_together(name: str) -> None:
    network, side = a_network(name), side_of(name)
    cases = [a_batch(seed, side=side) for seed in range(2)]
    expected = torch.zeros(())
    for case in cases:
        network.zero_grad()
        loss_with(network)(case).backward()
        grads = [p.grad for p in network.parameters()]
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(network.parameters(), grads, strict=True)
            ]
        )
        expected = expected + flat * (CLIP / flat.norm())
    assert torch.allclose(summed(network, cases).float(), expected, atol=1e-7)


def test_a_gradient_that_isnt_finite_counts_as_zero() -> None:
    network = a_network("unet")
    good, bad = a_batch(0, side=16), a_batch(1, side=16)
    bad[0][0, 0, 0, 0, 0] = torch.nan
    assert torch.equal(summed(network, [good, bad]), summed(network, [good]))
    assert not summed(network, []).any()


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_opacus_clips_to_the_same_sum() -> None:
    """An independent per-sample gradient, with one patch a case and a linear network."""
    from opacus import grad_sample

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(27, 5), nn.ReLU(), nn.Linear(5, 3))
    images, labels = torch.randn(6, 1, 3, 3, 3), torch.arange(6) % 3
    total, _, _ = clipped_sum(
        [(images[i : i + 1], labels[i : i + 1]) for i in range(6)],
        lambda batch: functional.cross_entropy(network(batch[0]), batch[1]),
        list(network.parameters()),
        clip=0.3,
    )
    wrapped = grad_sample.GradSampleModule(network, loss_reduction="sum")
    functional.cross_entropy(wrapped(images), labels, reduction="sum").backward()
    samples = torch.cat([p.grad_sample.reshape(6, -1) for p in wrapped.parameters()], dim=1)
    factors = (0.3 / samples.norm(dim=1)).clamp(max=1)
    expected = (samples * factors[:, None]).sum(0)
    assert torch.allclose(torch.cat([part.reshape(-1) for part in total]), expected, atol=1e-5)


def test_the_noise_and_the_divisor_are_those_of_the_mechanism() -> None:
    parameter = nn.Parameter(torch.zeros(40_000))
    parameter.grad = None
    gradient = noised_gradient([parameter], clip=2.0, noise_multiplier=1.5, expected=4.0)
    loss, patches = gradient([], loss_with(nn.Identity()))  # nobody was drawn
    assert (float(loss), patches) == (0.0, 0)
    assert parameter.grad is not None
    first = parameter.grad.clone()
    assert float(first.std()) == pytest.approx(1.5 * 2.0 / 4.0, rel=0.02)
    gradient([], loss_with(nn.Identity()))
    assert not torch.equal(first, parameter.grad)


def test_each_case_is_drawn_on_its_own() -> None:
    rng = np.random.default_rng(0)
    drawn = [drawn_cases(8, 0.3, rng) for _ in range(4000)]
    table = np.zeros((len(drawn), 8))
    for row, indices in zip(table, drawn, strict=True):
        row[indices] = 1
    assert table.mean(0) == pytest.approx(np.full(8, 0.3), abs=0.03)
    apart = np.corrcoef(table.T) - np.eye(8)
    assert np.abs(apart).max() < 0.06
    assert [] in drawn and drawn_cases(5, 1.0, rng) == [0, 1, 2, 3, 4]
    assert drawn_cases(0, 0.5, rng) == []


def a_case(seed: int) -> CachedCase:
    shape = (20, 20, 20)
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    labels[4:12, 4:12, 4:12], labels[6:9, 6:9, 6:9] = 1, 2
    return CachedCase(
        image=(labels + 0.3 * rng.standard_normal(shape)).astype(np.float16),
        labels=labels,
        foreground={"liver": np.flatnonzero(labels), "tumor": np.flatnonzero(labels == 2)},
        truth=labels,
        placement=Placement(
            shape=shape,
            spacing=(1.0, 1.0, 1.0),
            grid=shape,
            box=(slice(0, 20), slice(0, 20), slice(0, 20)),
        ),
    )


def stepped(cases: Sequence[CachedCase], rng: np.random.Generator | None, rate: float = 1.0):  # type: ignore[no-untyped-def]
    return list(
        case_batches(
            cases,
            rate=rate,
            steps=3,
            batch_size=2,
            patch_size=(16, 16, 16),
            foreground=0.67,
            augmentation="light",
            rng=rng,
        )
    )


def test_what_a_case_gives_doesnt_depend_on_the_others() -> None:
    cases = [a_case(seed) for seed in range(3)]
    all_of_them = stepped(cases, np.random.default_rng(5))
    other_last = stepped([*cases[:2], a_case(77)], np.random.default_rng(5))
    for one, other in zip(all_of_them, other_last, strict=True):
        assert [len(one), len(other)] == [3, 3]
        for index in range(2):
            assert torch.equal(one[index][0], other[index][0])
        assert not torch.equal(one[2][0], other[2][0])
        assert one[0][0].shape == (2, 1, 16, 16, 16) and one[0][1].dtype == torch.int64


def test_the_draw_is_secret() -> None:
    """Accounting counts on it: no seed of the study gives the same draw twice."""
    cases = [a_case(seed) for seed in range(4)]
    sizes = []
    for _ in range(2):
        np.random.seed(0)
        torch.manual_seed(0)
        sizes.append([[float(b[0].sum()) for b in step] for step in stepped(cases, None, 0.5)])
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("proximal_mu", [0.0, 0.1])
def test_without_noise_and_clip_training_is_plain_gradient_descent(proximal_mu: float) -> None:
    batches = [[a_batch(10 * step + case, side=16) for case in range(2)] for step in range(3)]
    config = TrainConfig(optimizer="sgd", momentum=0, weight_decay=0, schedule="constant")
    private, plain = a_network("unet"), a_network("unet")
    parameters = list(private.parameters())
    gradient = noised_gradient(parameters, clip=1e6, noise_multiplier=1e-16, expected=2.0, key=KEY)
    common = {"steps": 3, "round_number": 1, "rounds": 1, "proximal_mu": proximal_mu}
    config = config.model_copy(update={"precision": "fp32"})
    found = fit(private, batches, LOSSES["dice-ce"], config, gradient=gradient, **common)
    assert (found.steps, found.patches) == (3, 12)
    start = [p.detach().clone() for p in plain.parameters()]
    for step in batches:
        loss = sum(loss_with(plain)(batch) for batch in step) / 2
        apart = sum(((p - q) ** 2).sum() for p, q in zip(plain.parameters(), start, strict=True))
        plain.zero_grad()
        (loss + 0.5 * proximal_mu * apart).backward()
        with torch.no_grad():
            for p in plain.parameters():
                if p.grad is not None:
                    p -= config.learning_rate * p.grad
    for one, other in zip(private.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_what_a_forward_pass_writes_into_buffers_stays_out() -> None:
    network = nn.BatchNorm3d(1)
    with unchanged_buffers(network):
        network.train()(torch.randn(2, 1, 4, 4, 4))
        assert network.num_batches_tracked == 1
    assert network.num_batches_tracked == 0 and not network.running_mean.any()
