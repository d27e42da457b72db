"""Tests of the weights that sites get from their own numbers."""

import pytest

from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import TRAIN_METRICS

METRICS = {
    "cases": 12.0,
    "patches": 80.0,
    "voxels": 3e7,
    "steps": 40.0,
    "annotated": 2.0,
}


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("cases", 12.0),
        ("patches", 80.0),
        ("voxels", 3e7),
        ("equal", 1.0),
        ("inverse-steps", 12 / 40),
        ("annotated", 12.0),
    ],
)
def test_weight_of_a_site(name: str, weight: float) -> None:
    assert WEIGHTINGS[name](METRICS) == weight


def test_a_site_that_annotates_one_region_of_two_counts_half() -> None:
    assert WEIGHTINGS["annotated"]({**METRICS, "annotated": 1.0}) == 6.0


def test_epochs_of_any_number_of_steps_count_alike_by_inverse_steps() -> None:
    weigh = WEIGHTINGS["inverse-steps"]
    assert weigh({"cases": 10, "steps": 40}) == weigh({"cases": 20, "steps": 80})
    assert weigh({"cases": 10, "steps": 40}) == 2 * weigh({"cases": 10, "steps": 80})


def test_a_site_without_steps_has_a_finite_weight() -> None:
    assert WEIGHTINGS["inverse-steps"]({"cases": 10, "steps": 0}) == 10


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_sites_send_what_is_needed(name: str) -> None:
    assert WEIGHTINGS[name](dict.fromkeys(TRAIN_METRICS, 2.0)) > 0
