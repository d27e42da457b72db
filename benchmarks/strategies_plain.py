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
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from harness import processor, write_result

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase, cached_case
from fedseg.data.patches import batches
from fedseg.data.phantom import KINDS, phantom_seeds, write_phantom_site
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.data.sites import site_cases
from fedseg.federation.compression import make_scheme
from fedseg.federation.flat import flatten, layout_of, unflatten
from fedseg.federation.reduce import reducer_of
from fedseg.federation.spool import open_update, spool
from fedseg.federation.strategies import make_strategy, next_state, train_config
from fedseg.messages import Task
from fedseg.segmentation.evaluation import evaluate_cases
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.metrics import summarise
from fedseg.segmentation.models import build_model
from fedseg.segmentation.training import fit, make_optimizer
from fedseg.site_config import load_site_config

SITES = ("portal", "arterial", "native")
CASES, HELD_OUT = 6, 3
SMALL = {
    "model.width": 8,
    "model.depth": 3,
    "train.patch-size": "16,16,16",
    "train.spacing": "9,9,9",
    "train.ct-window": "-100,250",
    "train.batch-size": 2,
    "train.learning-rate": 2e-3,
    "train.precision": "fp32",
    "federation.server-momentum": 0.5,
}
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


def prepare(root: Path, plan: Plan, seed: int, site: int, count: int) -> list[CachedCase]:
    """Write phantoms of one kind and preprocess them."""
    kind = KINDS[SITES[site % 3]]
    folder = root / f"seed-{seed}-site-{site}"
    write_phantom_site(folder, kind, phantom_seeds(seed, site, count), name=f"site-{site}")
    listing, config = site_cases(folder, load_site_config({}, folder=folder))
    return [
        cached_case(case, plan, root / "cache", modality=config.modality) for case in listing.cases
    ]


class Site:
    """A site with a network and an optimiser that lives as long as the run."""

    def __init__(self, name: str, cases: list[CachedCase], plan: Plan, study: StudyConfig) -> None:
        self.name, self.cases, self.plan, self.study = name, cases, plan, study
        self.network = build_model(plan, seed=study.train.seed)
        self.optimizer = make_optimizer(self.network, study.train)

    def train(self, number: int, rounds: int, steps: int, mu: float = 0.0) -> dict[str, float]:
        """Train a round; return what a site says of it."""
        losses: list[float] = []
        drawn = batches(
            self.cases,
            steps=steps,
            batch_size=self.plan.batch_size,
            patch_size=self.plan.patch_size,
            foreground=self.study.train.foreground,
            augmentation=self.study.train.augmentation,
            rng=np.random.default_rng([self.study.train.seed, number, *self.name.encode()]),
        )
        fit(
            self.network,
            drawn,
            dice_ce,
            self.study.train,
            steps=steps,
            round_number=number,
            rounds=rounds,
            proximal_mu=mu,
            optimizer=self.optimizer,
            on_step=lambda step, of, loss: losses.append(float(loss)),
        )
        return {"cases": len(self.cases), "steps": steps, "first_loss": losses[0]}


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
    keys = {**SMALL, "train.seed": seed, "train.learning-rate": rate, **keys}
    study = StudyConfig.from_run_config(keys)
    plan = make_plan(study)
    sites = [Site(f"site-{n}", cases, plan, study) for n, cases in enumerate(shares)]
    state = dict((trained or build_model(plan, seed=seed)).state_dict())
    layout = layout_of(state)
    strategy, reduce = own() if own else make_strategy(study), reducer_of(study)
    scheme = make_scheme("none")
    to = Message(RecordDict(), dst_node_id=1, message_type="train")
    to.metadata.__dict__["_message_id"] = "m"
    task = Task(study_run="r", config_digest="d", plan="{}", round_number=1, rounds=1)
    for number in range(1, options.rounds + 1):
        config = train_config(strategy, number, state, task.to_record(), [1, 2, 3])
        mu = float(config.get("proximal-mu", 0.0))
        with tempfile.TemporaryDirectory() as folder:
            metrics, updates = [], []
            for site in sites:
                site.network.load_state_dict(state)
                metrics.append(site.train(number, options.rounds, options.steps, mu))
                change = flatten(site.network.state_dict(), layout) - flatten(state, layout)
                path = spool(Path(folder), site.name, {"values": change}, scheme=scheme)
                updates.append(open_update(path, size=layout.size))
            moved = reduce(updates, [m["cases"] for m in metrics], metrics)
        state = next_state(strategy, number, state, unflatten(moved, layout), to)
    network = build_model(plan)
    network.load_state_dict(state)
    return network


def alone(
    seed: int, cases: list[CachedCase], name: str, options: argparse.Namespace
) -> torch.nn.Module:
    """One site's own training, the same steps."""
    study = StudyConfig.from_run_config({**SMALL, "train.seed": seed})
    site = Site(name, cases, make_plan(study), study)
    for number in range(1, options.rounds + 1):
        site.train(number, options.rounds, options.steps)
    return site.network


def score(network: torch.nn.Module, cases: list[CachedCase], plan: Plan) -> float:
    if not all(torch.isfinite(p).all() for p in network.parameters()):
        return 0.0
    sums = evaluate_cases(network, cases, plan, device=torch.device("cpu"), precision="fp32")
    return float(summarise(sums)["liver.dice"] or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.steps = 1, 2, 3
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    torch.set_num_threads(1)
    scores: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FEDSEG_HOME"] = scratch
        plan = make_plan(StudyConfig.from_run_config(dict(SMALL)))
        for seed in range(options.seeds):
            shares = [prepare(Path(scratch), plan, seed, site, CASES) for site in range(3)]
            held_out = [
                case
                for site in range(900, 903)
                for case in prepare(Path(scratch), plan, seed, site, HELD_OUT)
            ]
            each = [
                score(alone(seed, cases, f"site-{n}", options), held_out, plan)
                for n, cases in enumerate(shares)
            ]
            scores.setdefault("each site alone", []).append([float(np.mean(each)), np.nan])
            trained = None
            for setting in settings():
                first = federated(setting, seed, shares, options)
                trained = trained or first  # FedAvg's, which comes first
                then = federated(setting, seed, shares, options, trained=trained)
                found = [score(first, held_out, plan), score(then, held_out, plan)]
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
