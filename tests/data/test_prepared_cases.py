"""Tests of which cases a site holds out: each message chooses anew and must choose the same."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fedseg.config import StudyConfig
from fedseg.data.node import open_site
from fedseg.data.planning import make_plan
from fedseg.data.prepared_cases import _held_out, load_cases
from fedseg.data.sites import Case, Site
from fedseg.site_config import SiteConfig


def held_out_of(names: Iterable[str], *, fraction: float, seed: int) -> set[str]:
    root = Path("/data")
    cases = tuple(Case(image=root / "images" / n, mask=root / "masks" / n) for n in names)
    site = Site(
        name="", simulated=False, sites=0, config=SiteConfig(), root=root, cases=cases, unpaired=0
    )
    return {case.image.name for case in _held_out(site, fraction=fraction, seed=seed)}


@given(
    numbers=st.sets(st.integers(0, 10**6), min_size=2, max_size=40),
    new=st.integers(10**6 + 1, 2 * 10**6),
    fraction=st.sampled_from([0.05, 0.2, 0.5, 0.9]),
    seed=st.integers(0, 100),
    shuffled=st.randoms(use_true_random=False),
)
def test_one_case_more_or_less_moves_one_other_at_most(
    numbers: set[int], new: int, fraction: float, seed: int, shuffled: random.Random
) -> None:
    names = [f"case-{number}.nii.gz" for number in numbers]
    without = held_out_of(names, fraction=fraction, seed=seed)
    assert len(without) == min(max(1, round(fraction * len(names))), len(names) - 1)
    shuffled.shuffle(names)
    assert held_out_of(names, fraction=fraction, seed=seed) == without
    added = f"case-{new}.nii.gz"
    with_it = held_out_of([*names, added], fraction=fraction, seed=seed)
    assert len((with_it ^ without) - {added}) <= 1


def test_the_split_follows_from_seed_and_name_not_from_how_a_case_is_compressed() -> None:
    names = [f"case-{number}.nii" for number in range(20)]
    splits = [held_out_of(names, fraction=0.2, seed=seed) for seed in range(10)]
    assert len({frozenset(split) for split in splits}) == 10
    packed = held_out_of([f"{name}.gz" for name in names], fraction=0.2, seed=0)
    assert packed == {f"{name}.gz" for name in splits[0]}
    assert held_out_of(names, fraction=0.0, seed=0) == set()
    assert held_out_of(["a.nii"], fraction=0.2, seed=0) == set()


def test_a_case_that_cannot_be_read_moves_no_other_between_the_sets(
    make_site: Callable[..., Path],
) -> None:
    folder = make_site("aachen", cases=6)
    plan = make_plan(StudyConfig.from_run_config({"train.patch-size": "16,16,16"}))

    def split() -> tuple[set[bytes], set[bytes]]:
        site = open_site({"data-dir": str(folder)}, StudyConfig())
        cases = load_cases(site, plan, validation_fraction=0.4, seed=0)
        assert cases.skipped == 6 - len(cases.training) - len(cases.validation)
        training, validation = (
            {case.image.tobytes() for case in part} for part in (cases.training, cases.validation)
        )
        return training, validation

    training, validation = split()
    assert (len(training), len(validation)) == (4, 2)
    lost = []
    for mask in sorted((folder / "masks").iterdir()):
        whole = mask.read_bytes()
        mask.write_bytes(whole[:40])
        now = split()
        assert now[0] <= training and now[1] <= validation
        lost.append(len(training | validation) - len(now[0] | now[1]))
        mask.write_bytes(whole)
    assert lost == [1] * 6
    folder = folder.rename(folder.with_name("moved"))
    assert split() == (training, validation)
