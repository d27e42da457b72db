"""Do sites that annotate only the liver help with tumours, and what does it cost to ignore it?

    python benchmarks/partial_labels.py [--seeds 3] [--rounds 12] [--settings same,other]

Two phantom sites annotate liver and tumour, two the liver alone. Of the same rounds, the same steps
a site and the same held-out phantoms:

- without: only the two sites with tumour masks;
- naive: the other two claim `labels = "liver,tumor"`, so their tumours count as liver;
- cases: they say `labels = "liver"` (marginal loss), each update weighs by its cases;
- annotated: the same with `federation.weighting = "annotated"`.

Setting `same`: all four sites have the two contrast phases that the held-out cases have. `other`:
the tumour masks are of one phase alone, the liver masks of two others, held-out cases of all three.
Runs in the plain loop of `plain_federation.py`; writes `results/<date>-partial-labels.md`.
"""

import argparse
import dataclasses
import datetime
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import processor, write_result
from plain_federation import begin, federate, phantoms

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.phantom import KINDS
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.segmentation.evaluation import evaluate_cases
from fedseg.segmentation.metrics import summarise

SETTINGS = {
    "same": ("portal", "native", "portal", "native"),
    "other": ("portal", "portal", "arterial", "native"),
}
"""Contrast phase of each site; the last two annotate the liver alone."""

BOTH, LIVER = ("liver", "tumor"), ("liver",)
ARMS = {
    "without": ((BOTH, BOTH), "cases"),
    "naive": ((BOTH, BOTH, BOTH, BOTH), "cases"),
    "cases": ((BOTH, BOTH, LIVER, LIVER), "cases"),
    "annotated": ((BOTH, BOTH, LIVER, LIVER), "annotated"),
}
"""What each site says that it annotates, and the weighting."""

STUDY: dict[str, object] = {
    "model.width": 8,
    "model.depth": 4,
    "train.patch-size": "32,32,32",
    "train.inference-patch": "48,48,48",
    "train.spacing": "4,4,4",
    "train.ct-window": "-80,240",
    "train.batch-size": 2,
    "train.learning-rate": 2e-3,
}
CASES, HELD_OUT = 10, 12


def without_tumors(case: CachedCase) -> CachedCase:
    """The case as a site has it that annotates the liver alone: label 2 became 1."""
    foreground = {**case.foreground, "tumor": case.foreground["tumor"][:0]}
    return dataclasses.replace(
        case, labels=np.minimum(np.asarray(case.labels), 1), foreground=foreground
    )


def cases_of(
    root: Path, plan: Plan, setting: str, seed: int
) -> tuple[list[list[CachedCase]], list[CachedCase]]:
    """Cases of each site, and held-out ones of all phases alike."""
    kinds = SETTINGS[setting]
    shares = [
        phantoms(root, plan, KINDS[kind], seed=seed, site=n, count=CASES)
        for n, kind in enumerate(kinds)
    ]
    shares[2:] = [[without_tumors(case) for case in share] for share in shares[2:]]
    phases = list(dict.fromkeys(kinds))
    held_out = []
    for n, kind in enumerate(phases):
        count = HELD_OUT // len(phases)
        held_out += phantoms(root, plan, KINDS[kind], seed=seed, site=900 + n, count=count)
    return shares, held_out


def scores(
    arm: str,
    shares: list[list[CachedCase]],
    held_out: list[CachedCase],
    keys: dict[str, object],
    steps: int,
) -> tuple[float, float]:
    """Train one arm; liver and tumour Dice, mean over the held-out cases."""
    labels, weighting = ARMS[arm]
    count = len(labels)
    keys = {**keys, "federation.weighting": weighting}
    network = federate(keys, shares[:count], [steps] * count, annotated=labels)[0]
    plan = make_plan(StudyConfig.from_run_config(dict(keys)))
    found = summarise(evaluate_cases(network, held_out, plan, device=torch.device("cpu")))
    return float(found["liver.dice"] or 0), float(found["tumor.dice"] or 0)


def table(found: dict[tuple[str, str], list[tuple[float, float]]], heading: str) -> str:
    """Means over the seeds; the difference to `without` is taken seed by seed."""
    rows = [
        f"# Partial labels, {datetime.date.today()}",
        "",
        heading,
        "",
        "| phases | two sites without tumour masks | liver Dice | tumour Dice | by seed "
        "| tumour against without, lowest and highest seed |",
        "|---" * 6 + "|",
    ]
    for (setting, arm), pairs in found.items():
        liver, tumor = np.mean(pairs, axis=0)
        each = ", ".join(f"{pair[1]:.3f}" for pair in pairs)
        apart = [a[1] - b[1] for a, b in zip(pairs, found[setting, "without"], strict=True)]
        against = f"{np.mean(apart):+.3f} ({min(apart):+.3f} to {max(apart):+.3f})"
        against = "" if arm == "without" else against
        rows.append(f"| {setting} | {arm} | {liver:.3f} | {tumor:.3f} | {each} | {against} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run, compare, write down after each seed: what is there counts if the rest is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40, help="of each site and round")
    everything = ",".join(SETTINGS)
    parser.add_argument("--settings", default=everything)
    options = parser.parse_args()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        begin(Path(folder))
        plan = make_plan(StudyConfig.from_run_config(dict(STUDY)))
        for seed in range(options.seeds):
            for setting in options.settings.split(","):
                shares, held_out = cases_of(Path(folder), plan, setting, seed)
                keys = {**STUDY, "train.seed": seed, "federation.rounds": options.rounds}
                for arm in ARMS:
                    pair = scores(arm, shares, held_out, keys, options.steps)
                    found.setdefault((setting, arm), []).append(pair)
                    print(seed, setting, arm, *(f"{value:.3f}" for value in pair), flush=True)
            heading = (
                f"{processor()}; {seed + 1} seed(s), {options.rounds} rounds of {options.steps} "
                f"steps a site, {CASES} cases a site, {HELD_OUT} held-out phantoms a seed"
            )
            part = "" if options.settings == everything else f"-{options.settings}"
            write_result("partial-labels" + part, table(found, heading))


if __name__ == "__main__":
    main()
