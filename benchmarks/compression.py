"""What compressed updates save, what they cost in Dice, and how long packing takes.

    python benchmarks/compression.py [--seeds 3]     # a phantom study for each scheme and seed
    python benchmarks/compression.py --codec-only    # no study: error and milliseconds alone
    python benchmarks/compression.py --quick         # two tiny studies, to see that it runs

Studies are README's command one (three sites, six rounds) but for the scheme, scored on the
server's held-out phantoms. The codec packs one real update: a site's first round, trained here from
the same start; times are of that update and of 30M values of its distribution.
"""

import argparse
import dataclasses
import datetime
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from harness import processor, run, write_part, write_result

from fedseg.config import StudyConfig
from fedseg.data.node import open_site
from fedseg.data.patches import batches
from fedseg.data.planning import make_plan
from fedseg.data.prepared_cases import load_cases
from fedseg.federation.compression import (
    Scheme,
    check_parts,
    decode,
    encode,
    finite_and_norm,
    make_scheme,
)
from fedseg.federation.flat import flatten, layout_of
from fedseg.federation.spool import open_update, spool
from fedseg.segmentation.losses import LOSSES
from fedseg.segmentation.models import build_model
from fedseg.segmentation.training import fit

CHUNK = 2**20
LARGE = 30_000_000
TINY = "federation.rounds=2 data.phantom-cases=3 data.server-cases=1 train.steps-per-epoch=2"


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of the curve."""

    compression: str
    top_k: float = 0.1
    download: str = "fp32"

    @property
    def name(self) -> str:
        share = f" {self.top_k:g}" if self.compression == "top-k" else ""
        down = ", fp16 down" if self.download == "fp16" else ""
        return f"{self.compression}{share}{down}"

    @property
    def options(self) -> str:
        return (
            f'federation.compression="{self.compression}" federation.top-k={self.top_k} '
            f'federation.download="{self.download}"'
        )

    @property
    def scheme(self) -> Scheme:
        return make_scheme(self.compression, top_k=self.top_k)


POINTS = (
    Point("none"),
    Point("fp16"),
    Point("int8"),
    Point("int4"),
    Point("top-k", 0.3),
    Point("top-k", 0.1),
    Point("int8", download="fp16"),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a study came to: bytes of all sites in a round, Dice of the last round."""

    up: float
    down: float
    seconds: float
    dice: tuple[float, float]


def study(point: Point, seed: int, options: str) -> Outcome:
    """Run a phantom study."""
    with tempfile.TemporaryDirectory() as folder:
        config = f"{point.options} train.seed={seed} {options}"
        seconds, history = run(config, Path(folder))
    rounds, scores = history[1:], history[-1]["global"]
    return Outcome(
        up=statistics.mean(line["bytes_up"] for line in rounds),
        down=statistics.mean(line["bytes_down"] for line in rounds),
        seconds=seconds,
        dice=(scores["liver.dice"] or 0.0, scores["tumor.dice"] or 0.0),
    )


def curve(points: tuple[Point, ...], seeds: int, options: str) -> list[str]:
    """Run a study for each scheme and seed; what whole seeds came to stays if it is broken off."""
    found: dict[Point, list[Outcome]] = {point: [] for point in points}
    for seed in range(seeds):
        for point in points:
            found[point].append(study(point, seed, options))
            print(seed, point.name, found[point][-1], flush=True)
        if seed + 1 < seeds:
            write_part("compression", "\n".join(table(found)) + "\n")
    return table(found)


def table(found: Mapping[Point, Sequence[Outcome]]) -> list[str]:
    """A row for each scheme; Dice as the mean over seeds and, in points, beside uncompressed."""
    rows = [
        "| updates | MB up a round | of fp32 | MB down | liver Dice (points) | tumour Dice "
        "(points) | by seed: liver, tumour | `flwr run`, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = next(iter(found.values()))
    for point, outcomes in found.items():
        up = statistics.mean(o.up for o in outcomes)
        dice = []
        for region in (0, 1):
            mean = statistics.mean(o.dice[region] for o in outcomes)
            apart = 100 * (mean - statistics.mean(o.dice[region] for o in base))
            dice.append(f"{mean:.3f} ({apart:+.1f})")
        each = "; ".join(f"{o.dice[0]:.3f}, {o.dice[1]:.3f}" for o in outcomes)
        rows.append(
            f"| {point.name} | {up / 1e6:.2f} | {up / statistics.mean(o.up for o in base):.3f} | "
            f"{statistics.mean(o.down for o in outcomes) / 1e6:.1f} | {dice[0]} | {dice[1]} | "
            f"{each} | {statistics.mean(o.seconds for o in outcomes):.0f} |"
        )
    return rows


def real_update(steps: int, side: int) -> torch.Tensor:
    """Train a phantom site's first round; return the change as a vector `[N]`."""
    config = {
        "train.patch-size": f"{side},{side},{side}",
        "train.spacing": "3,3,3",
        "data.phantom-cases": 3,
        "model.width": 16,
        "train.learning-rate": 2e-3,
    }
    study_config = StudyConfig.from_run_config(config)
    plan = make_plan(study_config)
    site = open_site({"partition-id": 0, "num-partitions": 3}, study_config)
    cases = load_cases(site, plan, validation_fraction=0.2, seed=0)
    network = build_model(plan, seed=0)
    layout = layout_of(network.state_dict())
    before = flatten(network.state_dict(), layout)
    drawn = batches(
        cases.training,
        steps=steps,
        batch_size=2,
        patch_size=plan.patch_size,
        foreground=0.67,
        augmentation="none",
        rng=np.random.default_rng(0),
    )
    loss = LOSSES["dice-ce"]
    fit(network, drawn, loss, study_config.train, steps=steps, round_number=1, rounds=6)
    return flatten(network.state_dict(), layout) - before


def milliseconds(work: Callable[[], object], repeats: int) -> str:
    """Median of some repetitions, and lowest to highest."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return f"{statistics.median(taken):.0f} ({min(taken):.0f}-{max(taken):.0f})"


def codec(vector: torch.Tensor, points: tuple[Point, ...], repeats: int) -> list[str]:
    """A row for each scheme: bytes, error, time at the site, at arrival, and to read it once."""
    rows = [
        f"{len(vector) / 1e6:.1f}M values; milliseconds: median of {repeats} (lowest-highest)",
        "",
        "| updates | MB | of fp32 | relative error | encode | check and norm | read from disk |",
        "|---|---|---|---|---|---|---|",
    ]
    size = len(vector)
    for point in points:
        scheme = point.scheme
        parts = encode(vector, scheme)
        error = float((decode(parts, scheme, 0, size) - vector).norm() / vector.norm())
        with tempfile.TemporaryDirectory() as folder:
            path = spool(Path(folder), "site", parts, scheme=scheme)
            times = (
                milliseconds(functools.partial(encode, vector, scheme), repeats),
                milliseconds(functools.partial(judge, parts, scheme, size), repeats),
                milliseconds(functools.partial(read, path, size), repeats),
            )
        rows.append(
            f"| {point.name} | {scheme.bytes(size) / 1e6:.2f} | "
            f"{scheme.bytes(size) / (4 * size):.3f} | {error:.4f} | {' | '.join(times)} |"
        )
    return [*rows, ""]


def judge(parts: dict[str, torch.Tensor], scheme: Scheme, size: int) -> None:
    """What the server does with an update that arrives."""
    check_parts(parts, scheme, size=size)
    assert finite_and_norm(parts, scheme, size=size)[0]


def read(path: Path, size: int) -> None:
    """What a reducer does."""
    update = open_update(path, size=size)
    for start in range(0, size, CHUNK):
        update.chunk(start, min(start + CHUNK, size))


def main() -> None:
    """Measure, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--codec-only", action="store_true", help="no studies; no result")
    parser.add_argument("--quick", action="store_true", help="tiny; no result")
    parser.add_argument("-c", default="", help="more study config, as for flwr run")
    arguments = parser.parse_args()
    studied = POINTS
    packed = tuple(point for point in POINTS if point.download == "fp32")
    if arguments.quick:
        arguments.seeds, arguments.c = 1, f"{TINY} {arguments.c}"
        studied = (Point("none"), Point("int8"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDSEG_HOME"] = folder
        vector = real_update(*((2, 32) if arguments.quick else (40, 48)))
    repeats = 2 if arguments.quick else 5
    rows = [
        f"# Compressed updates, {datetime.date.today()}",
        "",
        f"{processor()}; load average {os.getloadavg()[0]:.1f}; {torch.get_num_threads()} threads",
        "",
        *codec(vector, packed, repeats),
    ]
    if not arguments.quick:
        rows += codec(vector.repeat(-(-LARGE // len(vector)))[:LARGE], packed, repeats)
    if not arguments.codec_only:
        seeds = "seed 0" if arguments.seeds == 1 else f"seeds 0 to {arguments.seeds - 1}"
        rows += [
            f"Phantom studies, {seeds}, options: `{arguments.c.strip() or 'none'}`; bytes are of "
            "all three sites; Dice on held-out phantoms after the last round",
            "",
            *curve(studied, arguments.seeds, arguments.c),
        ]
    text = "\n".join(rows).rstrip() + "\n"
    if arguments.quick or arguments.codec_only:
        print(text)
    else:
        write_result("compression", text)


if __name__ == "__main__":
    main()
