"""Are the server's learning rates safe? Every strategy on small phantoms, in one plain loop.

    python benchmarks/strategies_plain.py                 # 3 seeds
    python benchmarks/strategies_plain.py --quick         # one seed, two rounds: does it run?

Three sites scan in different contrast phases. Each strategy does the same rounds from the same
weights through the same reducers and Flower classes as a real run, without Flower's runtime: once
with Flower's default parameters, once with FedSeg's. Beside them each site alone. Then each goes on
from FedAvg's model with a tenth of the learning rate: does it keep what was learnt? Dice of the
liver on held-out phantoms of all three kinds, mean over cases.
"""

import argparse
import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.serverapp import strategy as flower
from harness import processor, write_result
from plain_federation import SMALL, begin, federate, liver_dice, phantoms, train_alone

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.phantom import KINDS
from fedseg.data.planning import make_plan

SITES = ("portal", "arterial", "native")
CASES, HELD_OUT = 6, 3
FLOWER: dict[str, Callable[[], flower.Strategy]] = {
    "fedavgm": lambda: flower.FedAvgM(server_momentum=0.9),
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedadagrad": flower.FedAdagrad,
}
Setting = tuple[str, dict[str, object], Callable[[], flower.Strategy] | None]


def settings() -> list[Setting]:
    """Name, study keys, Flower's own strategy where it is to be used as it comes."""
    rows: list[Setting] = [("fedavg", {}, None), ("fedprox", {}, None)]
    for name, build in FLOWER.items():
        other = "rate 1, momentum 0.9" if name == "fedavgm" else "Flower's defaults"
        rows.append((f"{name}, {other}", {"federation.strategy": name}, build))
        rows.append((name, {"federation.strategy": name}, None))
    rows.append(("fednova", {}, None))
    rows.append(("qfedavg, 1 / L = learning rate", _qfedavg(2e-3), None))
    rows.append(("qfedavg", {}, None))
    return [(n, k or {"federation.strategy": n}, b) for n, k, b in rows]


def _qfedavg(rate: float) -> dict[str, object]:
    return {"federation.strategy": "qfedavg", "federation.server-learning-rate": rate}


def federated(
    setting: Setting,
    seed: int,
    shares: list[list[CachedCase]],
    options: argparse.Namespace,
    *,
    trained: torch.nn.Module | None = None,
) -> torch.nn.Module:
    """Run the rounds, from a trained network where one is given; return the global network."""
    _, keys, own = setting
    rate = float(SMALL["train.learning-rate"]) / (10 if trained else 1)  # type: ignore[arg-type]
    keys = {**study_keys(seed, options), "train.learning-rate": rate, **keys}
    steps = [options.steps] * len(shares)
    return federate(keys, shares, steps, own=own() if own else None, trained=trained)[0]


def study_keys(seed: int, options: argparse.Namespace) -> dict[str, object]:
    return {**SMALL, "train.seed": seed, "federation.rounds": options.rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.steps = 1, 2, 3
    scores: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        begin(Path(scratch))
        plan = make_plan(StudyConfig.from_run_config(dict(SMALL)))
        for seed in range(options.seeds):
            root = Path(scratch)
            shares = [
                phantoms(root, plan, KINDS[kind], seed=seed, site=n, count=CASES)
                for n, kind in enumerate(SITES)
            ]
            held_out = [
                case
                for n, kind in enumerate(SITES)
                for case in phantoms(
                    root, plan, KINDS[kind], seed=seed, site=900 + n, count=HELD_OUT
                )
            ]
            each = [
                liver_dice(
                    train_alone(study_keys(seed, options), cases, f"site-{n}", options.steps),
                    held_out,
                    plan,
                )
                for n, cases in enumerate(shares)
            ]
            scores.setdefault("each site alone", []).append([float(np.mean(each)), np.nan])
            trained = None
            for setting in settings():
                first = federated(setting, seed, shares, options)
                trained = trained or first  # FedAvg's, which comes first
                then = federated(setting, seed, shares, options, trained=trained)
                found = [liver_dice(network, held_out, plan) for network in (first, then)]
                scores.setdefault(setting[0], []).append(found)
                print(seed, setting[0], *(f"{value:.3f}" for value in found), flush=True)
    if not options.quick:
        write_result("strategies-plain", table(scores, options))


def table(scores: dict[str, list[list[float]]], options: argparse.Namespace) -> str:
    rows = [
        f"# Strategies in a plain loop, {datetime.date.today()}",
        "",
        f"{processor()}; {options.seeds} seeds, {options.rounds} rounds of {options.steps} steps, "
        f"{len(SITES)} sites of {CASES} cases, {3 * HELD_OUT} held-out cases",
        "",
        "| strategy | liver Dice | by seed | from FedAvg's model, a tenth of the rate | by seed |",
        "|---|---|---|---|---|",
    ]
    for name, found in scores.items():
        cells = []
        for column in zip(*found, strict=True):
            each = ", ".join(f"{value:.3f}" for value in column)
            cells += [f"{np.mean(column):.3f}", each] if np.isfinite(column).all() else ["", ""]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
