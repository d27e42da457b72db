"""A site's training loop: against the limit, MONAI's ways and nnU-Net v2's trainer.

    python benchmarks/training.py                       # all parts, about half an hour
    python benchmarks/training.py --quick               # does it run? numbers mean little
    python benchmarks/training.py --parts loops,nnunet

Parts: `loops` (whole loops of the default U-Net, two patches of 64^3 a step, cut from 256x256x128
scans, interleaved in one process), `data` (drawing alone, by case size), `transforms` (each change
of a patch), `memory` (2 cases against 100), `start` (from torch's import to the first step),
`nnunet` (its trainer and FedSeg's `fit` on its own planned network, in a venv kept in `--venv`),
`compile` (what `torch.compile` costs and gives), `profile` (what is left of a round).
Writes `benchmarks/results/<date>-training.md`.
"""

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# As the client app sets it: waiting threads that spin stall a step when the cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent / "training"))

import loops
import numpy as np
import torch
from harness import ROOT, cached_scan, processor, rival_venv, write_result
from training_network import build

from fedseg.data.augmentation import Change, apply_change, source_size
from fedseg.data.patches import batches
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.training import fit, make_optimizer

HERE = Path(__file__).parent / "training"
PARTS = ("loops", "data", "transforms", "memory", "start", "nnunet", "compile", "profile")
SIZE = (64, 64, 64)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def part_loops(scratch: Path, options: argparse.Namespace) -> str:
    """Whole loops, interleaved; each ratio is taken within one repeat."""
    cases, steps = (2, 2) if options.quick else (8, 8)
    repeats = 2 if options.quick else options.repeats
    niftis = loops.write_niftis(scratch / "niftis", cases)
    cached = scratch / "cases"
    contenders = {
        "limit: tensors in memory": loops.limit(cached, cases),
        "FedSeg, no augmentation": loops.fedseg(cached, cases, "none"),
        "FedSeg, light": loops.fedseg(cached, cases, "light"),
        "FedSeg, full": loops.fedseg(cached, cases, "full"),
        "MONAI, tuned": loops.tuned(niftis),
        "MONAI, tutorial style": loops.tutorial(niftis),
    }
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    work: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(1)
    for _ in range(repeats):
        for name, run in contenders.items():
            gc.collect()
            began, used = time.perf_counter(), time.process_time()
            run(steps)
            wall[name].append((time.perf_counter() - began) / steps)
            work[name].append((time.process_time() - used) / steps)
    bare, bare_work = (times["limit: tensors in memory"] for times in (wall, work))
    rows = []
    for name in contenders:
        ratios = [a / b for a, b in zip(wall[name], bare, strict=True)]
        of_work = [a / b for a, b in zip(work[name], bare_work, strict=True)]
        milliseconds = [1000 * seconds for seconds in wall[name]]
        cells = (statistics.median(milliseconds), min(milliseconds))
        rows.append([name, *(f"{ms:.0f}" for ms in cells), spread(ratios), spread(of_work)])
    head = ["loop", "ms a step, median", "best", "times the limit", "processor time, the same"]
    return f"{repeats} repeats of {steps} steps, interleaved.\n\n{table(head, rows)}"


def part_data(scratch: Path, options: argparse.Namespace) -> str:
    """Drawing a batch from cases of any size, beside a step."""
    network, _ = build()
    optimizer = make_optimizer(network, loops.CONFIG)
    steps = 5 if options.quick else 40
    rows = []
    shapes = [(96, 96, 64), (256, 256, 128)] + ([] if options.quick else [(512, 512, 256)])
    for shape in shapes:
        name = "x".join(map(str, shape))
        cases = [cached_scan(scratch / name / str(number), shape, number) for number in range(3)]
        for augmentation in ("none", "light", "full"):
            drawn = batches(
                cases,
                steps=steps,
                batch_size=2,
                patch_size=SIZE,
                foreground=0.67,
                augmentation=augmentation,
                rng=np.random.default_rng(0),
            )
            waits: list[float] = []

            def timed(drawn=drawn, waits=waits):
                while True:
                    began = time.perf_counter()
                    batch = next(drawn, None)
                    waits.append(time.perf_counter() - began)
                    if batch is None:
                        return
                    yield batch

            report = fit(
                network,
                timed(),
                dice_ce,
                loops.CONFIG,
                steps=steps,
                round_number=1,
                rounds=1,
                optimizer=optimizer,
            )
            each = report.seconds / steps
            share = sum(waits) / report.seconds
            median = 1000 * statistics.median(waits[:-1])
            rows.append([name, augmentation, f"{median:.2f}", f"{1000 * each:.0f}", f"{share:.1%}"])
    head = ["case", "augmentation", "ms a batch, median", "ms a step", "share of all time"]
    return table(head, rows)


def part_transforms(scratch: Path, options: argparse.Namespace) -> str:
    """Each change of a patch."""
    changes = {
        "flips": Change(flips=(1, 2)),
        **{f"rotation about {name}": Change(angle=15.0, axis=n) for n, name in enumerate("xyz")},
        "scale to 0.7": Change(scale=0.7),
        "scale to 1.4": Change(scale=1.4),
        "noise": Change(noise=0.1),
        "blur": Change(blur=0.75),
        "contrast": Change(contrast=1.1),
        "brightness": Change(brightness=0.1),
        "low resolution": Change(low_resolution=0.7),
        "gamma": Change(gamma=1.2),
    }
    rows = []
    for name, change in changes.items():
        size = source_size(change, SIZE)
        image = torch.randn(size)
        labels = torch.randint(0, 3, size, dtype=torch.uint8)
        times = []
        for _ in range(5 if options.quick else 50):
            copy = image.clone()
            began = time.perf_counter()
            apply_change(copy, labels, change, size=SIZE)
            times.append(1000 * (time.perf_counter() - began))
        rows.append([name, f"{statistics.median(times):.2f}", f"{min(times):.2f}"])
    return table(["change of one 64^3 patch", "ms, median", "best"], rows)


def script(name: str, *words: object, python: Path | None = None, scratch: Path) -> dict:
    """Run one of the scripts beside this file in a process of its own; its last line is JSON."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", HERE))),
        "FEDSEG_SITE": sysconfig.get_paths()["purelib"],
    }
    command = [str(python or sys.executable), str(HERE / name), *map(str, words)]
    done = subprocess.run(command, env=env, cwd=scratch, stdout=subprocess.PIPE, check=True)
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def part_memory(scratch: Path, options: argparse.Namespace) -> str:
    """Resident memory of a process that trains from 2 cases, and from 100."""
    counts = (2, 10) if options.quick else (2, 100)
    rows, last = [], []
    for count in counts:
        draws = 10 if options.quick else 150
        found = script("memory.py", scratch / "cases", count, draws, scratch=scratch)
        rows.append([count, *(f"{found[key]:.0f}" for key in ("VmRSS", "VmHWM", "RssFile"))])
        last.append(found["VmRSS"])
    head = ["cases of 256x256x128", "resident MB", "at its peak", "of it mapped files"]
    return f"{table(head, rows)}\n\n{last[1] - last[0]:+.0f} MB."


def part_start(scratch: Path, options: argparse.Namespace) -> str:
    """Seconds from torch's import to the end of the first step, in fresh processes."""
    folder = scratch / "cases"
    for number in range(2):
        cached_scan(folder / str(number), loops.SHAPE, number)
    found = [
        script("start.py", folder, options.threads, scratch=scratch)
        for _ in range(1 if options.quick else 5)
    ]
    head = ["imports, Flower's too", "network and cases", "first step", "together"]
    parts = [[run[key] for run in found] for key in ("imports", "network", "first step")]
    parts.append([sum(run.values()) for run in found])
    return "Seconds after torch's own import.\n\n" + table(head, [[spread(p) for p in parts]])


def part_nnunet(scratch: Path, options: argparse.Namespace) -> str:
    """nnU-Net's trainer and `fit` on the same network, patch and batch."""
    requirements = ["nnunetv2==2.8.1", "tomli"]
    python = rival_venv(options.venv, requirements)
    steps, repeats = (1, 1) if options.quick else (5, 4)
    folder = scratch / "nnunet"
    found = script(
        "nnunet.py", folder, steps, repeats, options.threads, python=python, scratch=scratch
    )
    names = {"nnunet": "nnU-Net v2.8.1", "fedseg": "FedSeg's `fit`, full augmentation"}
    rows = [
        [title, spread(found["seconds"][n]), spread(found["work"][n])] for n, title in names.items()
    ]
    ratios = [
        spread([b / a for a, b in zip(found[kind]["fedseg"], found[kind]["nnunet"], strict=True)])
        for kind in ("seconds", "work")
    ]
    rows.append(["FedSeg is faster by", *ratios])
    head = ["trainer", "seconds a step", "processor seconds, without workers"]
    title = f"{found['parameters'] / 1e6:.1f}M parameters, {repeats} repeats of {steps} steps."
    return f"{title}\n\n{table(head, rows)}"


def part_compile(scratch: Path, options: argparse.Namespace) -> str:
    """First and later steps with `torch.compile`."""
    network, _ = build()
    rows = []
    image, labels = torch.randn(2, 1, *SIZE), torch.randint(0, 3, (2, *SIZE))
    steps = 2 if options.quick else 12
    for name, model in (("as it is", network), ("torch.compile", torch.compile(network))):
        optimizer = make_optimizer(network, loops.CONFIG)
        moments = [time.perf_counter()]
        fit(
            model,
            [(image, labels)] * (steps + 1),
            dice_ce,
            loops.CONFIG,
            steps=steps + 1,
            round_number=1,
            rounds=1,
            optimizer=optimizer,
            on_step=lambda step, steps, loss, m=moments: (
                float(loss),
                m.append(time.perf_counter()),
            ),
        )
        each = np.diff(moments)
        rows.append([name, f"{each[0]:.1f}", f"{statistics.median(each[1:]):.3f}"])
    return table(["network", "first step, s", "later steps, s"], rows)


def part_profile(scratch: Path, options: argparse.Namespace) -> str:
    """Where a round's processor time goes."""
    steps = 2 if options.quick else 20
    run = loops.fedseg(scratch / "cases", 2, "full")
    run(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(steps)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [
            f"`{event.key}`",
            f"{event.self_cpu_time_total / total:.1%}",
            f"{event.self_cpu_time_total / steps / 1000:.1f}",
        ]
        for event in events[:14]
    ]
    rest = sum(event.self_cpu_time_total for event in events[14:]) / total
    head = ["operation", "share", "ms a step"]
    return f"{table(head, rows)}\n\nAll others: {rest:.1%}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, no result file")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repeats", type=int, default=10, help="of the interleaved loops")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "fedseg-nnunet")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = [f"# Training, {datetime.date.today()}\n"]
    text.append(
        f"{processor()}; {options.threads} threads; torch {torch.__version__}; U-Net of 4.8M"
    )
    text[-1] += f" parameters, two patches of 64^3; load at the start {os.getloadavg()[0]:.1f}\n"
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts.split(","):
            work: Callable[[Path, argparse.Namespace], str] = globals()[f"part_{part}"]
            found = work(Path(folder), options)
            title = (work.__doc__ or part).rstrip(".")
            text.append(f"## {title}\n\n{found}\n")
            print(text[-1], flush=True)
    if options.quick:
        return
    write_result("training", "\n".join(text))


if __name__ == "__main__":
    main()
