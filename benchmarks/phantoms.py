"""The phantom study end to end, beside the best single HU threshold.

    python benchmarks/phantoms.py            # README's command one
    python benchmarks/phantoms.py --long     # 20 rounds, to beat the threshold clearly

Runs `flwr run` from this checkout in a FLWR_HOME of its own, from the seeded random start, three
sites of different contrast phase, and writes `benchmarks/results/<date>-phantoms[-long].md`.
The threshold is given the true liver: tumour is every voxel in it darker than t HU, with the
one t that is best over all these cases. No network gets that help.
"""

import argparse
import datetime
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fedseg.config import StudyConfig
from fedseg.data.held_out import server_groups
from fedseg.data.sites import Case
from fedseg.data.volumes import read_image, read_mask
from fedseg.segmentation.metrics import score

ROOT = Path(__file__).resolve().parents[1]
LONG = "federation.rounds=20 data.server-cases=4"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(options: str, scratch: Path) -> tuple[float, list[dict]]:
    """Run the study; return seconds from `flwr run` to its end, and the history."""
    ports = (str(free_port()), str(free_port()))
    env = {
        **os.environ,
        "FLWR_HOME": str(scratch / "flwr"),
        "FEDSEG_HOME": str(scratch / "fedseg"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["flwr", "run", str(ROOT), "--stream"]
    command += ["--federation-config", "num-supernodes=3"]
    command += ["-c", f'output.dir="{scratch / "runs"}" {options}']
    began = time.monotonic()
    try:
        subprocess.run(command, env=env, cwd=scratch, check=True)
        seconds = time.monotonic() - began
        manifest = json.loads((scratch / "runs" / "latest" / "manifest.json").read_text())
        assert manifest["status"] == "completed", manifest
    finally:
        stop_superlink(ports[0])
    lines = (scratch / "runs" / "latest" / "history.jsonl").read_text().splitlines()
    return seconds, [json.loads(line) for line in lines]


def stop_superlink(port: str) -> None:
    """Stop the local SuperLink that `flwr run` left running on our own port."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "--port" in words and port in words and any("superlink" in word for word in words):
            os.kill(int(entry.name), signal.SIGTERM)


def threshold_dice(cases: list[Case]) -> tuple[int, float, float]:
    """Best HU threshold inside the true liver: threshold, tumour Dice per case, pooled."""
    levels = np.arange(-50, 151, 2)
    counts = np.zeros((len(cases), len(levels), 3))
    for row, case in enumerate(cases):
        image = read_image(case.image)
        labels = read_mask(case.mask, image=image).array
        hu, tumor = image.array[labels >= 1], labels[labels >= 1] == 2
        for column, level in enumerate(levels):
            found = hu < level
            tp = np.count_nonzero(found & tumor)
            counts[row, column] = tp, found.sum() - tp, tumor.sum() - tp
    per_case = np.array([[score(*cell).get("dice", np.nan) for cell in row] for row in counts])
    means = np.nanmean(per_case, 0)
    best = int(means.argmax())
    return int(levels[best]), float(means[best]), score(*counts.sum(0)[best])["dice"]


def processor() -> str:
    """Name of the processor and number of cores."""
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", text)
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    cores = len(os.sched_getaffinity(0))
    return f"{found.group(1) if found else platform.machine()}, {cores} cores, {', '.join(flags)}"


def main() -> None:
    """Run, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="20 rounds")
    parser.add_argument("-c", default="", help="more study config, as for flwr run")
    arguments = parser.parse_args()
    options = f"{LONG if arguments.long else ''} {arguments.c}".strip()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        seconds, history = run(options, scratch)
        os.environ["FEDSEG_HOME"] = str(scratch / "fedseg")
        number = 4 if arguments.long else StudyConfig().data.server_cases
        study = StudyConfig.from_run_config({"data.server-cases": number})
        groups = server_groups(study, simulated=True)
        thresholds = {name: threshold_dice(list(cases)) for name, (cases, _) in groups.items()}
    first = next(line for line in history[1:] if line["global"])
    last = history[-1]
    rows = [
        f"# Phantom study, {datetime.date.today()}",
        "",
        f"{processor()}; `flwr run` to its end: {seconds:.0f} s; one run, seed 0; "
        f"options: `{options or 'none'}`",
        "",
        f"| held-out phantoms | liver Dice, round {first['round']} | last | tumour Dice, round "
        f"{first['round']} | last | last, pooled | best HU threshold in the true liver (pooled) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in (("global", "the sites' kinds"), ("unseen", "a kind no site has")):
        level, dice, pooled = thresholds[name]
        a, b = first[name], last[name]
        cells = [a["liver.dice"], b["liver.dice"], a["tumor.dice"], b["tumor.dice"]]
        cells.append(b["tumor.dice.pooled"])
        numbers = " | ".join(f"{cell:.3f}" for cell in cells)
        rows.append(
            f"| {title} ({b['cases']}) | {numbers} | {dice:.3f} ({pooled:.3f}) at {level} HU |"
        )
    text = "\n".join(rows) + "\n"
    print(text)
    name = f"{datetime.date.today()}-phantoms{'-long' if arguments.long else ''}.md"
    (ROOT / "benchmarks" / "results" / name).write_text(text)


if __name__ == "__main__":
    main()
