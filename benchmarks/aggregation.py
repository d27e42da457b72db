"""Aggregation: time and memory of FedSeg's reducers beside Flower's own, on the same updates.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --quick            # a thirtieth of the size: does it run?
    python benchmarks/aggregation.py --sites 2,64       # only: does memory grow with the sites?

Updates of 30 million values, 10 sites, and of 3 million, 100 sites. FedSeg reads them from its
spool, as in a run; Flower has all replies in memory, as in a run. One read of the updates is
measured both ways: from the spool, chunk by chunk, and in memory.

Each operation has a process of its own. FedSeg's and Flower's take turns; times are the best of
`--repeats` and the median. Memory is read from outside, in /proc: the peak of the resident set
(VmHWM, reset before the operation) less the resident set when all is there. The spool is read, not
mapped, so the file pages that the kernel keeps are in neither number.
"""

import argparse
import datetime
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from flwr.supercore.task_identity import TaskIdentity
from harness import processor, write_result

from fedseg.config import StudyConfig
from fedseg.federation.chunks import CHUNK, for_each_span
from fedseg.federation.compression import make_scheme
from fedseg.federation.reduce import reducer_of
from fedseg.federation.spool import SpooledUpdate, open_update, spool

ARRAYS = 60
"""Tensors in a reply to Flower: about as many as a U-Net has."""

STRATEGIES = ("mean", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg")
FLOWER: dict[str, Callable[[], flower.Strategy]] = {
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": lambda: flower.Krum(num_malicious_nodes=1),
}
"""Those whose time is compared; Flower's Bulyan takes minutes."""


def metrics(site: int) -> dict[str, float]:
    return {"cases": 1.0 + site, "steps": 10.0, "first_loss": 1.0, "annotated": 2.0}


def fedseg_reduce(strategy: str, updates: Sequence[SpooledUpdate]) -> None:
    name = "fedavg" if strategy == "mean" else strategy
    reduce = reducer_of(StudyConfig.from_run_config({"federation.strategy": name}))
    numbers = [metrics(site) for site in range(len(updates))]
    reduce(updates, [site["cases"] for site in numbers], numbers)


def read_spool(updates: Sequence[SpooledUpdate]) -> None:
    def work(start: int, stop: int) -> None:
        for update in updates:
            update.chunk(start, stop).sum()

    for_each_span(work, updates[0].size, length=CHUNK)


def read_memory(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.sum()


def replies(updates: Sequence[SpooledUpdate]) -> list[Message]:
    to = Message(RecordDict(), dst_node_id=1, message_type="train")
    to.metadata.__dict__["_message_id"] = "m"
    found = []
    for site, update in enumerate(updates):
        vector = update.chunk(0, update.size).numpy()
        parts = np.array_split(vector, ARRAYS)
        record = MetricRecord({"num-examples": 1 + site})
        content = RecordDict({"arrays": ArrayRecord(parts), "metrics": record})
        found.append(Message(content, reply_to=to))
    return found


def flower_reduce(strategy: str, messages: list[Message]) -> None:
    if strategy == "mean":
        aggregate_arrayrecords([message.content for message in messages], "num-examples")
    else:
        FLOWER[strategy]().aggregate_train(1, messages)


def child(who: str, strategy: str, folder: str, count: int, size: int) -> None:
    """Do the operation whenever a line comes in; say how long it took."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    paths = sorted(Path(folder).glob("*.safetensors"))[:count]
    updates = [open_update(path, size=size) for path in paths]
    work: Callable[[], None]
    for _ in sys.stdin:
        if who == "flower":  # Flower takes the replies apart, so each time anew
            work = functools.partial(flower_reduce, strategy, replies(updates))
        elif who == "memory":
            work = functools.partial(read_memory, [u.chunk(0, size).clone() for u in updates])
        elif who == "spool":
            work = functools.partial(read_spool, updates)
        else:
            work = functools.partial(fedseg_reduce, strategy, updates)
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
        work()
        print(time.perf_counter() - began, flush=True)
        del work


def started(who: str, strategy: str, folder: Path, count: int, size: int) -> subprocess.Popen[str]:
    words = [who, strategy, str(folder), str(count), str(size)]
    return subprocess.Popen(
        [sys.executable, __file__, "--child", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def status(process: subprocess.Popen[str], key: str) -> float:
    """A line of /proc/PID/status, MB."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def once(process: subprocess.Popen[str]) -> dict[str, float]:
    """One run: seconds, the peak of resident memory, and how much of it came in the run, MB."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("prepare\n")
    process.stdin.flush()
    process.stdout.readline()
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    before = status(process, "VmRSS")
    process.stdin.write("go\n")
    process.stdin.flush()
    seconds = float(process.stdout.readline())
    peak = status(process, "VmHWM")
    return {"seconds": seconds, "peak": peak, "extra": peak - before}


def in_turns(
    jobs: Sequence[tuple[str, str]], folder: Path, count: int, size: int, repeats: int
) -> list[dict[str, float]]:
    """Run jobs in turns; of each the best and median time, and the most memory."""
    processes = [started(who, strategy, folder, count, size) for who, strategy in jobs]
    runs = [[once(process) for process in processes] for _ in range(repeats)]
    for process in processes:
        process.communicate()
    return [
        {
            "best": min(run["seconds"] for run in own),
            "median": float(np.median([run["seconds"] for run in own])),
            "extra": max(run["extra"] for run in own),
            "peak": max(run["peak"] for run in own),
        }
        for own in zip(*runs, strict=True)
    ]


def write_updates(folder: Path, count: int, size: int) -> Path:
    for site in range(count):
        rng = torch.Generator().manual_seed(site)
        vector = 0.01 * torch.randn(size, generator=rng)
        spool(folder, f"site-{site:03d}", {"values": vector}, scheme=make_scheme("none"))
    return folder


def speed(count: int, size: int, repeats: int, scratch: Path) -> Iterator[str]:
    """Table of one size."""
    folder = write_updates(scratch / f"{count}", count, size)
    yield f"\n## {count} updates of {size / 1e6:g} million values\n"
    yield "| | seconds, best (median) | memory beyond the updates | Flower | its memory | faster |"
    yield "|---|---|---|---|---|---|"
    reads = in_turns(
        [("memory", ""), ("spool", ""), ("fedseg", "mean")], folder, count, size, repeats
    )
    for name, row in zip(("one read, in memory", "one read of the spool"), reads, strict=False):
        ratio = f"mean / read: {reads[2]['best'] / row['best']:.2f}"
        yield f"| {name} | {row['best']:.3f} ({row['median']:.3f}) | | | | {ratio} |"
    for strategy in ("mean", *FLOWER):
        jobs = [("fedseg", strategy), ("flower", strategy)]
        ours, theirs = in_turns(jobs, folder, count, size, repeats)
        yield (
            f"| {strategy} | {ours['best']:.3f} ({ours['median']:.3f}) | {ours['extra']:.0f} MB | "
            f"{theirs['best']:.3f} ({theirs['median']:.3f}) | {theirs['extra']:.0f} MB | "
            f"{theirs['best'] / ours['best']:.1f}x |"
        )


def memory(sites: Sequence[int], size: int, scratch: Path) -> Iterator[str]:
    """Peak of resident memory by number of sites."""
    folder = write_updates(scratch / "sites", max(sites), size)
    yield f"\n## Peak resident memory of the process that reduces, {size / 1e6:g} million values\n"
    yield f"| | {' | '.join(f'{count} sites' for count in sites)} | ratio |"
    yield "|---|" + "---|" * (len(sites) + 1)
    for strategy in STRATEGIES:
        counts = [max(count, 7) if strategy == "bulyan" else count for count in sites]
        found = [in_turns([("fedseg", strategy)], folder, n, size, 2)[0]["peak"] for n in counts]
        peaks = " | ".join(
            f"{peak:.0f} MB{f' ({n} sites)' if n != count else ''}"
            for peak, n, count in zip(found, counts, sites, strict=True)
        )
        yield f"| {strategy} | {peaks} | {found[-1] / found[0]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sites", default="", help="numbers of sites, e.g. 2,64: only memory")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        who, strategy, folder, count, size = options.child
        child(who, strategy, folder, int(count), int(size))
        return
    scale = 30 if options.quick else 1
    rows = [
        f"# Aggregation, {datetime.date.today()}",
        "",
        f"{processor()}; torch {torch.__version__}; {options.repeats} repeats, in turns; load "
        f"{os.getloadavg()[0]:.1f} at the start",
    ]
    with tempfile.TemporaryDirectory() as folder:
        if not options.sites:
            for count, size in ((10, 30_000_000), (100, 3_000_000)):
                rows += speed(count, size // scale, options.repeats, Path(folder))
        sites = [int(part) for part in (options.sites or "2,64").split(",")]
        rows += memory(sites, 10_000_000 // scale, Path(folder))
    text = "\n".join(rows) + "\n"
    print(text) if options.quick else write_result("aggregation", text)


if __name__ == "__main__":
    main()
