"""What federation costs: whole simulated jobs of FedSeg, a minimal Flower app and NVFlare.

    python benchmarks/overhead.py                  # 2 and 4 sites, 0 and 8 steps, 3 repeats
    python benchmarks/overhead.py --quick          # 2 sites, 0 steps, once: does it run?

Every contender does the same client work: the U-Net of 4.8M parameters, two patches a step, bf16
where the processor has it, weights as fp32, no evaluation; `plain` does it in one loop without any
federation. "0 steps" is one step on patches of 32^3, the least that FedSeg does; the others do it
too. The runs are interleaved, each from its own command to its end. Memory is the sum of the
proportional set sizes of all processes a run started: another process that uses the same venv
meanwhile makes it smaller. NVFlare gets a venv of its own, kept in `--venv` between runs.
`overhead/first_step.py`, which runs too, times a site's message up to its first step.
Writes `benchmarks/results/<date>-overhead.md`.
"""

import argparse
import datetime
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from harness import (
    ROOT,
    free_port,
    own_place,
    processor,
    rival_venv,
    stop_superlink,
    write_result,
)

from fedseg.data.phantom import KINDS, write_phantom_site

HERE = ROOT / "benchmarks" / "overhead"
CONTENDERS = ("plain", "fedseg", "flower", "nvflare")
ROUNDS = 3
SAMPLE_SECONDS = 0.3
CASES, POOL = 2, 8
NVFLARE = ["nvflare~=2.9.0", "monai==1.6.1"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting: sites, steps a round, side of a patch."""

    sites: int
    steps: int

    @property
    def side(self) -> int:
        return 64 if self.steps else 32

    @property
    def name(self) -> str:
        return f"{self.sites} sites, {self.steps} steps"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run took: seconds from command to end, of its last round, and GB at the peak."""

    seconds: float
    round_seconds: float
    gigabytes: float
    load: float


def write_sites(scratch: Path) -> None:
    """Write four folders of phantoms for FedSeg, and patches cut from them for the rivals."""
    for site in range(4):
        folder = scratch / "sites" / f"site-{site}"
        seeds = [10 * site + n for n in range(CASES)]
        write_phantom_site(folder, KINDS["portal"], seeds, name=folder.name)
        image, mask = (
            np.asarray(nib.load(next((folder / part).iterdir())).dataobj)
            for part in ("images", "masks")
        )
        image = (np.clip(image, -150, 250) / 100).astype(np.float16)
        rng = np.random.default_rng(site)
        for side in (32, 64):
            corners = [[int(rng.integers(n - side + 1)) for n in image.shape] for _ in range(POOL)]
            boxes = [tuple(slice(start, start + side) for start in corner) for corner in corners]
            place = scratch / f"patches-{side}"
            place.mkdir(exist_ok=True)
            np.save(place / f"images-{site}.npy", np.stack([image[box] for box in boxes]))
            np.save(place / f"labels-{site}.npy", np.stack([mask[box] for box in boxes]))


def command(contender: str, point: Point, scratch: Path, nvflare: Path) -> list[str | Path]:
    """The command that a user of the contender types."""
    if contender == "plain":
        return [sys.executable, HERE / "plain.py"]
    if contender == "nvflare":
        return [nvflare, HERE / "nvflare_job.py", scratch / "nvflare"]
    federation = f"num-supernodes={point.sites} client-resources-num-cpus=1"
    flower = ["flwr", "run", "--stream", "--federation-config", federation]
    if contender == "flower":
        return [*flower, HERE / "flower"]
    sites = scratch / f"sites-{point.sites}"
    sites.mkdir(exist_ok=True)
    for site in range(point.sites):
        if not (sites / f"site-{site}").exists():
            (sites / f"site-{site}").symlink_to(scratch / "sites" / f"site-{site}")
    patch = ",".join([str(point.side)] * 3)
    config = (
        f'data.source="folder" data.partition="folders" data.dir="{sites}" data.server-cases=0 '
        f'model.width=16 model.depth=5 train.patch-size="{patch}" train.batch-size=2 '
        f'train.spacing="2.5,2.5,3" train.ct-window="-150,250" train.augmentation="none" '
        f'train.steps-per-epoch={max(point.steps, 1)} train.optimizer-state="reset" '
        f"train.validation-fraction=0.0 federation.rounds={ROUNDS} "
        f'federation.evaluate-every={ROUNDS} federation.strategy="timed:fedavg" '
        f'output.dir="{scratch / "runs"}"'
    )
    return [*flower, ROOT, "-c", config]


def measure(contender: str, point: Point, scratch: Path, nvflare: Path) -> Run:
    """Run a contender once."""
    work = Path(tempfile.mkdtemp(prefix=f"{contender}-", dir=scratch))
    ports = (str(free_port()), str(free_port()))
    mark, stamps = uuid.uuid4().hex, work / "stamps"
    env = {
        **own_place(work, ports),
        "OVERHEAD_MARK": mark,
        "OVERHEAD_STAMPS": str(stamps),
        "OVERHEAD_PATCHES": str(scratch / f"patches-{point.side}"),
        "OVERHEAD_STEPS": str(max(point.steps, 1)),
        "OVERHEAD_SITES": str(point.sites),
        "OVERHEAD_ROUNDS": str(ROUNDS),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(HERE),
        "FEDSEG_HOME": str(scratch / "fedseg"),
    }
    if contender == "nvflare":  # all its sites run at once; Ray limits Flower's alike
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // point.sites))
    peak, over = [0.0], threading.Event()
    sampler = threading.Thread(target=sample, args=(mark, peak, over))
    load, began = os.getloadavg()[0], time.monotonic()
    with (work / "log").open("wb") as log:
        started = subprocess.Popen(
            command(contender, point, scratch, nvflare), env=env, cwd=work, stdout=log, stderr=log
        )
        sampler.start()
        code = started.wait()
    seconds = time.monotonic() - began
    over.set()
    sampler.join()
    stop_superlink(ports[0])
    rounds = [float(line) for line in stamps.read_text().split()] if stamps.exists() else []
    if code or len(rounds) != ROUNDS:
        raise SystemExit(f"{contender}, {point.name}: failed; its log: {keep(work / 'log')}")
    return Run(
        seconds=seconds,
        round_seconds=rounds[-1] - rounds[-2],
        gigabytes=peak[0] / 1024**2,
        load=load,
    )


def keep(log: Path) -> Path:
    """Save a log from the scratch folder."""
    kept = Path(tempfile.gettempdir()) / f"overhead-{uuid.uuid4().hex[:8]}.log"
    kept.write_bytes(log.read_bytes())
    return kept


def sample(mark: str, peak: list[float], over: threading.Event) -> None:
    """Keep the largest sum of PSS, kB, over all processes that carry the mark."""
    wanted = f"OVERHEAD_MARK={mark}".encode()
    while not over.wait(SAMPLE_SECONDS):
        total = 0.0
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (entry / "environ").read_bytes():
                    total += pss(entry)
            except OSError:
                continue
        peak[0] = max(peak[0], total)


def pss(process: Path) -> float:
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return float(line.split()[1])
    return 0.0


def cell(values: list[float], digits: int) -> str:
    """Median, and lowest to highest."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(runs: dict[tuple[Point, str], list[Run]]) -> list[str]:
    """A row for each point and contender; compared run by run with the others of a repeat."""
    titles = ["", "", "whole job, s", "of the minimal Flower app's", "last round, s"]
    titles += ["last round beyond the plain loop's, s", "peak memory, GB"]
    rows = [titles, ["---"] * len(titles)]
    for (point, contender), found in sorted(
        runs.items(), key=lambda item: (item[0][0].steps, item[0][0].sites)
    ):
        flower, plain = runs.get((point, "flower"), []), runs.get((point, "plain"), [])
        ratios = [a.seconds / b.seconds for a, b in zip(found, flower, strict=False)]
        extra = [a.round_seconds - b.round_seconds for a, b in zip(found, plain, strict=False)]
        cells = [cell([run.seconds for run in found], 1), cell(ratios, 2)]
        cells += [cell([run.round_seconds for run in found], 2), cell(extra, 2)]
        rows.append([point.name, contender, *cells, cell([run.gigabytes for run in found], 2)])
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sites", type=int, nargs="+", choices=(2, 3, 4), default=[2, 4])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "fedseg-nvflare")
    parser.add_argument("--quick", action="store_true", help="2 sites, 0 steps, once; no result")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    if options.quick:
        options.sites, options.steps, options.repeats, options.no_result = [2], [0], 1, True
    nvflare = options.venv.absolute() / "bin" / "python"
    if "nvflare" in options.only:
        nvflare = rival_venv(options.venv.absolute(), NVFLARE)
    points = [Point(sites=s, steps=n) for n in options.steps for s in options.sites]
    runs: dict[tuple[Point, str], list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_sites(scratch)
        for contender, side in itertools.product(options.only, options.steps):
            # Not counted: fills caches and compiles modules.
            measure(contender, Point(sites=max(options.sites), steps=side), scratch, nvflare)
        for repeat, point in itertools.product(range(options.repeats), points):
            for contender in rotated(options.only, repeat):
                run = measure(contender, point, scratch, nvflare)
                runs.setdefault((point, contender), []).append(run)
                print(repeat, point.name, contender, run, flush=True)
    loads = [run.load for found in runs.values() for run in found]
    text = "\n".join(
        [
            f"# Federation overhead, {datetime.date.today()}",
            "",
            f"{processor()}; {NVFLARE[0]}; {ROUNDS} rounds; median of {options.repeats} "
            f"interleaved runs (lowest-highest); load average {min(loads):.1f}-{max(loads):.1f}",
            "",
            *table(runs),
            "",
            "A train message to a site:",
            "",
            *first_step(),
            "",
        ]
    )
    print(text) if options.no_result else write_result("overhead", text)


def first_step() -> list[str]:
    """What `first_step.py` measures, as a list."""
    command = [sys.executable, HERE / "first_step.py"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [f"- {line}" for line in done.stdout.splitlines()]


def rotated(names: list[str], by: int) -> list[str]:
    """Another one first in each repeat."""
    shift = by % len(names)
    return names[shift:] + names[:shift]


if __name__ == "__main__":
    main()
