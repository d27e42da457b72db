"""What differential privacy costs in Dice: small runs on coarse phantoms, in one process.

Three sites, 9 mm voxels, a U-Net of 75,000 parameters: the liver is learnt in a minute without
noise. `python benchmarks/privacy.py [--rounds 6] [--seeds 2]`
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from harness import ROOT, processor, write_result

BASE = {
    "model.width": 8,
    "model.depth": 3,
    "train.patch-size": "16,16,16",
    "train.inference-patch": "32,32,32",
    "train.spacing": "9,9,9",
    "train.ct-window": "-100,250",
    "train.batch-size": 2,
    "train.patches-per-case": 8,
    "train.learning-rate": 3e-3,
    "train.precision": "fp32",
    "train.optimizer-state": "keep",
    "federation.weighting": "equal",
    "federation.guard": False,
    "federation.personal": False,
    "federation.evaluate-every": 100,
    "data.server-cases": 2,
    "privacy.force": True,
}
CENTRAL = {"privacy.mode": "central-dp", "privacy.clip": 1.0}
LOCAL = {"privacy.mode": "local-dp", "privacy.clip": 1.0}
RECORD = {"privacy.mode": "record-dp", "privacy.clip": 1.0}
RUNS: dict[str, dict[str, object]] = {
    "none": {},
    "clipping, C = 1": {"privacy.clip": 1.0},
    "central-dp, z = 1": {**CENTRAL, "privacy.noise-multiplier": 1.0},
    "central-dp, z = .1": {**CENTRAL, "privacy.noise-multiplier": 0.1},
    "central-dp, z = .01": {**CENTRAL, "privacy.noise-multiplier": 0.01},
    "local-dp, z = 1": {**LOCAL, "privacy.noise-multiplier": 1.0},
    "record-dp, z = 1": {**RECORD, "privacy.noise-multiplier": 1.0},
    "record-dp, z = .5": {**RECORD, "privacy.noise-multiplier": 0.5},
}


def one_run(config: dict[str, object], scratch: Path, *, sites: int) -> dict:
    """Run a study and return the last line of its history and its expected cosine."""
    sys.path.insert(0, str(ROOT / "tests"))
    from local_grid import LocalGrid

    from fedseg import server_app, site_work
    from fedseg.config import StudyConfig
    from fedseg.privacy.forecast import forecast

    run_config = {**BASE, "output.dir": str(scratch / "runs"), **config}
    site_work._built.cache_clear()
    nodes = {n + 1: {"partition-id": n, "num-partitions": sites} for n in range(sites)}
    grid = LocalGrid(nodes, run_config)
    began = time.monotonic()
    folder = server_app.run_study(grid, Context(7, 1, {}, RecordDict(), run_config))
    lines = (folder.path / "history.jsonl").read_text().splitlines()
    line = json.loads(lines[-1])
    manifest = json.loads((folder.path / "manifest.json").read_text())
    study = StudyConfig.from_run_config(run_config)
    cosine = None
    if study.privacy.mode != "none":
        cosine = forecast(
            study, sites=sites, parameters=manifest["parameters"], batch_size=2, cases=10
        ).cosine
    return {
        "liver": line["global"]["liver.dice"],
        "tumor": line["global"]["tumor.dice"],
        "epsilon": (line["privacy"] or {}).get("epsilon"),
        "cosine": cosine,
        "parameters": manifest["parameters"],
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sites", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    rows = [
        "| privacy | epsilon | cosine, at most | liver Dice | tumour Dice | s |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FEDSEG_HOME"] = scratch
        for name, config in RUNS.items():
            found = [
                one_run(
                    {**config, "federation.rounds": options.rounds, "train.seed": seed},
                    Path(scratch),
                    sites=options.sites,
                )
                for seed in range(options.seeds)
            ]
            epsilon, cosine = found[0]["epsilon"], found[0]["cosine"]
            dice = [
                ", ".join(f"{run[region] or 0:.3f}" for run in found)
                for region in ("liver", "tumor")
            ]
            rows.append(
                f"| {name} | {'-' if epsilon is None else f'{epsilon:,.1f}'} | "
                f"{'-' if cosine is None else f'{cosine:.3f}'} | {dice[0]} | {dice[1]} | "
                f"{sum(run['seconds'] for run in found):.0f} |"
            )
            print(rows[-1], flush=True)
    head = (
        f"# Dice under differential privacy\n\n{processor()}, one thread; {options.sites} sites of "
        f"12 phantoms, 9 mm voxels, {options.rounds} rounds, {found[0]['parameters']:,} "
        f"parameters, delta 1e-5; mean Dice on the server's phantoms, seeds: {options.seeds}.\n\n"
    )
    write_result("privacy", head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
