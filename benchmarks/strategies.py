"""Every strategy on four splits of phantoms, beside each site alone and all cases pooled.

    python benchmarks/strategies.py              # 3 seeds
    python benchmarks/strategies.py --quick      # one seed, two rounds: does it run?
    python benchmarks/strategies.py --suffix long --splits contrast --only fedavg --rounds 15

Eight sites share 48 phantoms in three contrast phases: equal shares (iid), unequal numbers of cases
(size), unequal tumour load (dirichlet), or one phase a site (contrast). The plain loop of
`plain_federation.py` runs the same reducers and Flower classes as a real run. Steps go with a
site's cases, so a pooled run takes as many in all as the sites together; "pooled, a site's steps"
takes as many as one average site. Liver Dice on held-out phantoms of all phases (3 a phase unless
told otherwise), mean over cases. For the contrast split also: how many sites have a better model
than the one they trained alone, and the least gain of any site, both on the held-out phantoms of
all phases and on those of the site's own phase. Writes `benchmarks/results/<date>-strategies.md`.
"""

import argparse
import datetime
import itertools
import tempfile
from pathlib import Path

import numpy as np
from harness import processor, write_part, write_result
from plain_federation import SMALL, begin, federate, liver_dice, phantoms, train_alone

from fedseg.config import StudyConfig
from fedseg.data.cache import CachedCase
from fedseg.data.partition import partition
from fedseg.data.phantom import KINDS
from fedseg.data.plan import Plan
from fedseg.data.planning import make_plan
from fedseg.federation.strategies import STRATEGIES

PHASES = ("portal", "arterial", "native")
SITES, CASES = 8, 48
SPLITS = ("iid", "size", "dirichlet", "contrast")
ALPHA = 0.5


def settings() -> dict[str, dict[str, object]]:
    """Name of a row to its study keys: each strategy, and what is kept local."""
    rows: dict[str, dict[str, object]] = {
        name: {"federation.strategy": name} for name in STRATEGIES
    }
    rows["fedavg, equal weights"] = {"federation.weighting": "equal"}
    rows["fedavg, norms local (FedBN)"] = {"federation.shared": "all-but-norm"}
    rows["fedavg, head local"] = {"federation.shared": "all-but-head"}
    return rows


def load(case: CachedCase) -> float:
    """Tumour volume of a case, voxels."""
    return float((np.asarray(case.truth) == 2).sum())


def split(name: str, pool: dict[str, list[CachedCase]], seed: int) -> list[list[CachedCase]]:
    """Cases of each site."""
    if name == "contrast":
        # 3, 3 and 2 sites a phase, which share that phase's cases.
        owners = [[s for s in range(SITES) if s % 3 == phase] for phase in range(3)]
        return [
            pool[PHASES[s % 3]][owners[s % 3].index(s) :: len(owners[s % 3])] for s in range(SITES)
        ]
    cases = list(itertools.chain.from_iterable(pool.values()))
    loads = [load(case) for case in cases]
    shares = partition(name, loads, sites=SITES, alpha=ALPHA, seed=seed)
    return [[cases[n] for n in share] for share in shares]


def row(scores: dict[str, dict[str, list[float]]], name: str, column: str, value: float) -> None:
    scores.setdefault(name, {}).setdefault(column, []).append(value)


def one_split(
    name: str,
    shares: list[list[CachedCase]],
    held_out: dict[str, list[CachedCase]],
    plan: Plan,
    options: argparse.Namespace,
    seed: int,
    scores: dict[str, dict[str, list[float]]],
) -> None:
    """Train everything on one split and note the scores."""
    base = {**SMALL, "train.seed": seed, "federation.rounds": options.rounds}
    everyone = list(itertools.chain.from_iterable(held_out.values()))
    steps = [max(1, round(options.steps * len(share) * SITES / CASES)) for share in shares]
    alone = [train_alone(base, share, f"site-{n}", steps[n]) for n, share in enumerate(shares)]
    own = [held_out[PHASES[n % 3]] for n in range(SITES)]
    alone_all = [liver_dice(m, everyone, plan) for m in alone]
    row(scores, "each site alone", name, float(np.mean(alone_all)))
    alone_own = [liver_dice(m, own[n], plan) for n, m in enumerate(alone)]
    pooled = list(itertools.chain.from_iterable(shares))
    for label, count in (("pooled", sum(steps)), ("pooled, a site's steps", options.steps)):
        network = train_alone(base, pooled, "pooled", count)
        row(scores, label, name, liver_dice(network, everyone, plan))
    if name == "contrast":
        row(scores, "each site alone", "own phase", float(np.mean(alone_own)))
    for label, keys in settings().items():
        if options.only and label not in options.only:
            continue
        networks = federate({**base, **keys}, shares, steps)
        different = networks if "local" in label else networks[:1]
        each = [liver_dice(m, everyone, plan) for m in different]
        row(scores, label, name, float(np.mean(each)))
        print(seed, name, label, f"{np.mean(each):.3f}", flush=True)
        if name == "contrast":
            ends = [liver_dice(networks[n], own[n], plan) for n in range(SITES)]
            row(scores, label, "own phase", float(np.mean(ends)))
            for where, gains in (
                ("", np.subtract(each, alone_all)),  # one model for all sites: each has one entry
                (", own phase", np.subtract(ends, alone_own)),
            ):
                row(scores, label, f"sites better{where}", float((gains > 0).sum()))
                row(scores, label, f"least gain{where}", float(gains.min()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24, help="of an average site and round")
    parser.add_argument("--splits", default=",".join(SPLITS))
    parser.add_argument("--only", nargs="+", help="rows to run; all unless given")
    parser.add_argument("--held-out", type=int, default=3, help="phantoms of each phase")
    parser.add_argument("--suffix", default="", help="of the result's name")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.steps = 1, 2, 2
    scores: dict[str, dict[str, list[float]]] = {}
    result = f"strategies-{options.suffix}" if options.suffix else "strategies"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        begin(scratch)
        plan = make_plan(StudyConfig.from_run_config(dict(SMALL)))

        def make(phase: str, seed: int, site: int, count: int) -> list[CachedCase]:
            return phantoms(scratch, plan, KINDS[phase], seed=seed, site=site, count=count)

        for seed in range(options.seeds):
            pool = {p: make(p, seed, n, CASES // 3) for n, p in enumerate(PHASES)}
            held_out = {p: make(p, seed, 900 + n, options.held_out) for n, p in enumerate(PHASES)}
            for name in options.splits.split(","):
                shares = split(name, pool, seed)
                one_split(name, shares, held_out, plan, options, seed, scores)
            if seed + 1 < options.seeds:
                write_part(result, table(scores, options, seed + 1))
    if not options.quick:
        write_result(result, table(scores, options, options.seeds))
    else:
        print(table(scores, options, options.seeds))


def table(
    scores: dict[str, dict[str, list[float]]], options: argparse.Namespace, seeds: int
) -> str:
    columns = options.splits.split(",")
    if "contrast" in columns:
        columns += ["least gain", "sites better"]
        columns += ["own phase", "least gain, own phase", "sites better, own phase"]
    rows = [
        f"# Strategies and heterogeneity, {datetime.date.today()}",
        "",
        f"{processor()}; {seeds} seed(s), {options.rounds} rounds of {options.steps} steps at an "
        f"average site, {SITES} sites, {CASES} cases, {3 * options.held_out} held-out cases; "
        "liver Dice, mean of the seeds (lowest and highest seed); least gain over training alone "
        "and number of sites that gained: seed by seed",
        "",
        "| strategy | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, found in scores.items():
        cells = []
        for column in columns:
            values = found.get(column, [])
            if not values:
                cells.append("")
            elif column.startswith("sites better"):
                cells.append(", ".join(f"{value:.0f}" for value in values) + f" of {SITES}")
            elif column.startswith("least gain"):
                cells.append(", ".join(f"{value:+.3f}" for value in values))
            else:
                cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
