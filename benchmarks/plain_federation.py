"""A federation in one plain loop: FedSeg's reducers and strategies without Flower's runtime."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase, cached_case
from fedseg.data.patches import planned_batches
from fedseg.data.phantom import PhantomKind, phantom_seeds, write_phantom_site
from fedseg.data.plan import REGIONS, Plan
from fedseg.data.planning import make_plan
from fedseg.data.sites import site_cases
from fedseg.federation.compression import make_scheme
from fedseg.federation.flat import flatten, layout_of, unflatten
from fedseg.federation.head import tumor_rows
from fedseg.federation.reduce import reducer_of
from fedseg.federation.spool import open_update, spool
from fedseg.federation.strategies import make_strategy, next_state, train_config
from fedseg.federation.weighting import WEIGHTINGS
from fedseg.messages import Task
from fedseg.registry import resolve
from fedseg.segmentation.evaluation import evaluate_cases
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.metrics import summarise
from fedseg.segmentation.models import build_model
from fedseg.segmentation.sharing import split_state
from fedseg.segmentation.training import fit, make_optimizer
from fedseg.site_config import load_site_config

SMALL: dict[str, object] = {
    "model.width": 8,
    "model.depth": 3,
    "train.patch-size": "16,16,16",
    "train.spacing": "9,9,9",
    "train.ct-window": "-100,250",
    "train.batch-size": 2,
    "train.learning-rate": 2e-3,
    "train.precision": "fp32",
    "train.optimizer-state": "keep",
}
"""Coarse voxels and few channels: the liver is learnt in seconds, tumours are not seen."""


def begin(scratch: Path) -> None:
    """Give Flower's messages an identity, this process one thread and a place of its own."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    torch.set_num_threads(1)
    os.environ["FEDSEG_HOME"] = str(scratch)


def phantoms(
    root: Path, plan: Plan, kind: PhantomKind, *, seed: int, site: int, count: int
) -> list[CachedCase]:
    """Write phantoms of one kind and preprocess them."""
    folder = root / f"seed-{seed}-site-{site}-{kind.name}"
    write_phantom_site(folder, kind, phantom_seeds(seed, site, count), name=f"site-{site}")
    listing, config = site_cases(folder, load_site_config({}, folder=folder))
    return [
        cached_case(case, plan, root / "cache", modality=config.modality) for case in listing.cases
    ]


class Site:
    """A site with a network and an optimiser that lives as long as the run."""

    def __init__(
        self,
        name: str,
        cases: Sequence[CachedCase],
        plan: Plan,
        study: StudyConfig,
        annotated: Sequence[str] = tuple(REGIONS),
    ) -> None:
        self.name, self.cases, self.plan, self.study = name, cases, plan, study
        self.annotated = annotated
        self.network = build_model(plan, seed=study.train.seed)
        self.optimizer = make_optimizer(self.network, study.train)

    def train(self, number: int, rounds: int, steps: int, mu: float = 0.0) -> dict[str, float]:
        """Train a round; return what a site says of it."""
        losses: list[float] = []
        if self.study.train.optimizer_state == "reset":
            self.optimizer = make_optimizer(self.network, self.study.train)
        drawn = planned_batches(
            self.cases,
            self.plan,
            self.study.train,
            steps=steps,
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
            annotated=self.annotated,
            proximal_mu=mu,
            optimizer=self.optimizer,
            on_step=lambda step, of, loss: losses.append(float(loss)),
        )
        return {
            "cases": len(self.cases),
            "annotated": len(self.annotated),
            "steps": steps,
            "first_loss": losses[0],
        }


def federate(
    keys: Mapping[str, object],
    shares: Sequence[Sequence[CachedCase]],
    steps: Sequence[int],
    *,
    own: Strategy | None = None,
    trained: nn.Module | None = None,
    annotated: Sequence[Sequence[str]] | None = None,
) -> list[nn.Module]:
    """Run all rounds of a study.

    Args:
        keys: Study config.
        shares: Cases of each site.
        steps: Steps of each site a round.
        own: Strategy to use in place of the study's.
        trained: Network to start from.
        annotated: Regions that each site annotates; all of them by default.

    Returns:
        The model each site ends with: the global one, with its own layers where some are local.
    """
    study = StudyConfig.from_run_config(dict(keys))
    plan = make_plan(study)
    regions = annotated or [tuple(REGIONS)] * len(shares)
    sites = [Site(f"site-{n}", cases, plan, study, regions[n]) for n, cases in enumerate(shares)]
    weigh = resolve("federation.weighting", study.federation.weighting, WEIGHTINGS)
    if trained:
        for site in sites:
            site.network.load_state_dict(trained.state_dict())
    shared = study.federation.shared
    state = dict(split_state(sites[0].network, shared).shared)
    state = {name: tensor.clone() for name, tensor in state.items()}
    layout = layout_of(state)
    strategy = own or make_strategy(study)
    reduce = reducer_of(study, tumor_rows=tumor_rows(study, sites[0].network, plan))
    to = Message(RecordDict(), dst_node_id=1, message_type="train")
    to.metadata.__dict__["_message_id"] = "m"
    task = Task(study_run="r", config_digest="d", plan="{}", round_number=1, rounds=1)
    rounds = study.federation.rounds
    for number in range(1, rounds + 1):
        nodes = list(range(1, len(sites) + 1))
        config = train_config(strategy, number, state, task.to_record(), nodes)
        mu = float(config.get("proximal-mu", 0.0))
        metrics, updates = [], []
        with tempfile.TemporaryDirectory() as folder:
            for site, count in zip(sites, steps, strict=True):
                site.network.load_state_dict(state, strict=False)
                metrics.append(site.train(number, rounds, count, mu))
                after = split_state(site.network, shared).shared
                values = flatten(after, layout) - flatten(state, layout)
                path = spool(
                    Path(folder), site.name, {"values": values}, scheme=make_scheme("none")
                )
                updates.append(open_update(path, size=layout.size))
            moved = reduce(updates, [weigh(m) for m in metrics], metrics)
        state = next_state(strategy, number, state, unflatten(moved, layout), to)
    for site in sites:
        site.network.load_state_dict(state, strict=False)
    return [site.network for site in sites]


def train_alone(
    keys: Mapping[str, object], cases: Sequence[CachedCase], name: str, steps: int
) -> nn.Module:
    """The same rounds on one site's cases, or on all of them pooled."""
    study = StudyConfig.from_run_config(dict(keys))
    site = Site(name, cases, make_plan(study), study)
    for number in range(1, study.federation.rounds + 1):
        site.train(number, study.federation.rounds, steps)
    return site.network


def liver_dice(network: nn.Module, cases: Sequence[CachedCase], plan: Plan) -> float:
    """Mean liver Dice over the cases; 0 where the network is broken."""
    if not all(torch.isfinite(p).all() for p in network.parameters()):
        return 0.0
    sums = evaluate_cases(network, cases, plan, device=torch.device("cpu"), precision="fp32")
    return float(summarise(sums)["liver.dice"] or 0)
