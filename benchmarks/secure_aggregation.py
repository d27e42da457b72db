"""What secure aggregation costs: a round's seconds and bytes beside plain averaging.

    python benchmarks/secure_aggregation.py            # 10.8M parameters, 4 sites, 30 s of training
    python benchmarks/secure_aggregation.py --quick    # small and short: does it run?

In simulation, by `flwr run`, with 30 s of training at each site (as many at a time as Flower's
default lets): one step whose loss waits so long (`paced.py`), so that nothing but the rounds' own
work takes the processor. Each round also scores the model on the sites' held-out phantoms, masked
as well. The first round has Ray's start in it and is left out. Then the protocol alone over a
SuperLink and four SuperNodes on this machine, with a tiny network: how long each of its stages
takes. Writes `benchmarks/results/<date>-secure-aggregation.md`.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from harness import ROOT, processor, run, write_result

sys.path.insert(0, str(ROOT / "tests" / "deployment"))

from paced import SECONDS
from processes import SMALL, Workplace

SITES = 4
STAGES = ("keys", "shares", "words", "unmask")


def options(*, secure: bool, width: int, rounds: int) -> str:
    config = {
        "model.width": width,
        "model.depth": 5,
        "train.patch-size": "32,32,32",
        "train.spacing": "6,6,6",
        "train.ct-window": "-150,250",
        "train.batch-size": 2,
        "train.steps-per-epoch": 1,
        "train.loss": "paced:paced",
        "data.phantom-cases": 2,
        "data.server-cases": 0,
        "federation.rounds": rounds,
        "federation.guard": False,
        "federation.personal": False,
        "privacy.secure-aggregation": secure,
    }
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


def simulated(*, secure: bool, width: int, rounds: int) -> list[dict]:
    """Lines of all rounds but the first."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = options(secure=secure, width=width, rounds=rounds)
        _, history = run(chosen, Path(folder), sites=SITES)
    assert all("failed" not in line for line in history)
    return history[2:]


def deployed(rounds: int) -> list[dict]:
    """Lines of all rounds of a tiny study over SuperNodes."""
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        try:
            place.call("fedseg", "phantom", place.root / "sites", "--sites", SITES, "--cases", "2")
            place.superlink()
            place.connection("insecure = true")
            for index in range(SITES):
                name = f"site-{index}"
                config = {"data-dir": str(place.root / "sites" / name), "name": name}
                more = {"cache-dir": str(place.root / f"cache-{index}"), "device": "cpu"}
                place.supernode(name, {**config, **more, "threads": 1})
            place.wait_online(SITES)
            study = {
                **SMALL,
                "federation.rounds": rounds,
                "federation.guard": False,
                "federation.personal": False,
                "federation.sites": SITES,
                "privacy.secure-aggregation": True,
            }
            found = place.deploy(study, seconds=900)
            assert found.status == "finished:completed", found.output
            return found.history()[1:]
        finally:
            place.stop()


def middle(values: list[float]) -> float:
    return statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    width, rounds, training = (4, 2, 1) if quick else (24, 4, 30)
    os.environ[SECONDS] = str(training)
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    lines = {
        secure: simulated(secure=secure, width=width, rounds=rounds) for secure in (False, True)
    }
    seconds = {key: middle([line["seconds"] for line in found]) for key, found in lines.items()}
    up, down = (
        {key: middle([line[name] for line in found]) for key, found in lines.items()}
        for name in ("bytes_up", "bytes_down")
    )
    table = [("seconds a round", seconds, 1), ("MB from the sites", up, 1e6)]
    table.append(("MB to the sites", down, 1e6))
    rows = [
        f"# Cost of secure aggregation, {datetime.date.today()}",
        "",
        f"{processor()}; {SITES} simulated sites, {up[0] / SITES / 4e6:.1f} million parameters, "
        f"{training} s of training a site and round, one site at a time for each two cores; "
        f"median of rounds 2 to {rounds}, one run each. A round is training and scoring.",
        "",
        "| | plain | secure aggregation | ratio |",
        "|---|---|---|---|",
        *(
            f"| {name} | {two[0] / unit:.1f} | {two[1] / unit:.1f} | {two[1] / two[0]:.4f} |"
            for name, two, unit in table
        ),
        "",
        f"Added to a round: {seconds[1] - seconds[0]:.1f} s.",
        "",
    ]
    parts = {
        "simulation, updates": [line["secagg"]["seconds"] for line in lines[1]],
        "simulation, scores": [line["scored"]["seconds"] for line in lines[1]],
    }
    over = deployed(2 if quick else 4)
    parts["SuperNodes, updates"] = [line["secagg"]["seconds"] for line in over]
    parts["SuperNodes, scores"] = [line["scored"]["seconds"] for line in over]
    rows += [
        "Seconds of each stage (median). `words`: training or scoring, masking, upload. The "
        f"SuperNodes' network is tiny, SuperLink and {SITES} SuperNodes on this one machine.",
        "",
        f"| | {' | '.join(STAGES)} |",
        "|---|---|---|---|---|",
    ]
    for name, found in parts.items():
        cells = [f"{middle([part[stage] for part in found]):.1f}" for stage in STAGES]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(rows) + "\n"
    if quick:
        print(text)
    else:
        write_result("secure-aggregation", text)


if __name__ == "__main__":
    main()
