"""One of five phantom sites sends bad updates: what does it cost, with the guard and without?

    python benchmarks/attacks.py             # all attacks, one seed
    python benchmarks/attacks.py --quick     # two rounds of one attack: does it run?

The real ServerApp and ClientApp run in one process, as in the tests. The last site trains as it
should; what it sends is then replaced (`tests/federation/attackers.py`). Each attack runs with the
guard and without it; "without that site" is the same study with the other four. Without the guard
the check for finite values is off as well, which no study config can do. Liver Dice is over
held-out phantoms of the sites' kinds, scored from the last model, also where a run broke off. A
plain sign flip by one of five leaves three fifths of what they learn; four times the flip, which
the limit on norms lets through, leaves nothing.
Writes `benchmarks/results/<date>-attacks.md`.
"""

import argparse
import contextlib
import datetime
import io
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from harness import ROOT, processor, write_result

from fedseg import server_app, site_work
from fedseg.config import StudyConfig
from fedseg.data.held_out import server_cases
from fedseg.errors import StudyError
from fedseg.federation import collect
from fedseg.segmentation.evaluation import evaluate_cases
from fedseg.segmentation.metrics import summarise
from fedseg.segmentation.model_file import load_model
from fedseg.segmentation.training import choose_device

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "federation")]
from attackers import ATTACKS, attacker  # noqa: E402
from local_grid import LocalGrid  # noqa: E402

SITES = 5
BAD = f"site-{SITES - 1}"
# Coarse voxels and few channels: the liver is large, so its Dice passes .85 within a minute.
RECIPE: dict[str, Any] = {
    "data.phantom-cases": 8,
    "data.server-cases": 2,
    "model.width": 8,
    "train.spacing": "6,6,6",
    "train.patch-size": "32,32,32",
    "train.batch-size": 2,
    "train.ct-window": "-150,250",
    "train.steps-per-epoch": 16,
    "train.learning-rate": 0.002,
    "train.optimizer-state": "keep",
    "federation.rounds": 8,
    "federation.evaluate-every": 8,
    "federation.personal": False,
}
LEAST_DICE, WITHIN, HARM = 0.85, 0.02, 0.10
HARMFUL = ("NaN", "sign-flip x4", "100x")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one run: liver Dice, whole rounds, updates of the bad site and of others left out."""

    dice: float
    rounds: int
    bad_out: int
    honest_out: int

    @property
    def cell(self) -> str:
        return f"{self.dice:.3f} | {self.bad_out} of {self.rounds} | {self.honest_out}"


def study(config: dict[str, Any], scratch: Path, *, attack: str, sites: int = SITES) -> Outcome:
    """Run one study to its end, or to where it breaks off, and score its last model."""
    output = Path(tempfile.mkdtemp(dir=scratch))
    names = ",".join(f"site-{n}" for n in range(sites))
    config = {**config, "output.dir": str(output), "federation.sites": names}
    scored = {**config, "data.server-cases": 0}  # the server's own scores are not needed
    nodes = {n + 1: {"partition-id": n, "num-partitions": SITES} for n in range(sites)}
    reply = {SITES: attacker(attack)} if attack else {}
    site_work._built.cache_clear()
    grid = LocalGrid(nodes, scored, reply=reply)
    with contextlib.suppress(StudyError), contextlib.redirect_stdout(io.StringIO()):
        server_app.run_study(grid, Context(7, 1, {}, RecordDict(), scored))
    text = (output / "latest" / "history.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()][1:]
    out = [n for line in lines for n, site in line["sites"].items() if site["status"] != "ok"]
    return Outcome(
        dice=liver_dice(output / "latest" / "model-last.safetensors", config),
        rounds=len(lines),
        bad_out=out.count(BAD),
        honest_out=len(out) - out.count(BAD),
    )


def liver_dice(model: Path, config: dict[str, Any]) -> float:
    """Mean liver Dice over the held-out phantoms; 0 where a model finds no liver."""
    network, plan = load_model(model)
    held_out = server_cases(StudyConfig.from_run_config(config), plan, simulated=True)["global"]
    sums = evaluate_cases(network, held_out.cases, plan, device=choose_device("cpu"))
    return float(summarise(sums)["liver.dice"] or 0)


@contextlib.contextmanager
def guarded(on: bool) -> Iterator[dict[str, Any]]:
    """Study config with the guard, or without it and without the check for finite values."""
    with contextlib.ExitStack() as stack:
        if not on:
            passed = mock.patch.object(collect, "finite_and_norm", lambda *a, **k: (True, 1.0))
            stack.enter_context(passed)
        yield {**RECIPE, "federation.guard": on}


@contextlib.contextmanager
def one_process(scratch: Path) -> Iterator[None]:
    """Let both apps believe that they run under Flower; caches go to the scratch folder."""
    logging.disable(logging.ERROR)  # what the sites say of NaN weights is expected
    os.environ["FEDSEG_HOME"] = str(scratch / "fedseg")
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def verdict(attack: str, with_guard: Outcome, without: Outcome, reference: Outcome) -> str:
    """Whether the targets are met."""
    met = with_guard.dice >= reference.dice - WITHIN and reference.dice >= LEAST_DICE
    if attack in HARMFUL:
        met = met and without.dice <= reference.dice - HARM
    return "yes" if met else "no"


def main() -> None:
    """Run, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two rounds of one attack, no result")
    arguments = parser.parse_args()
    more: dict[str, Any] = {"train.seed": arguments.seed, "data.seed": arguments.seed}
    if arguments.quick:
        more |= {"federation.rounds": 2, "train.steps-per-epoch": 2, "data.phantom-cases": 2}
        arguments.only = arguments.only[:1]
    began = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as folder, one_process(scratch := Path(folder)):
        with guarded(True) as config:
            config |= more
            reference = study(config, scratch, attack="", sites=SITES - 1)
            honest = study(config, scratch, attack="")
        for attack in arguments.only:
            found = []
            for on in (True, False):
                with guarded(on) as config:
                    found.append(study(config | more, scratch, attack=attack))
                print(attack, on, found[-1], flush=True)
            rows.append(
                f"| {attack} | {found[0].cell} | {found[1].dice:.3f} ({found[1].rounds} rounds) | "
                f"{verdict(attack, *found, reference)} |"
            )
    text = "\n".join(
        [
            f"# Attacks by one of {SITES} sites, {datetime.date.today()}",
            "",
            f"{processor()}; one process, {time.monotonic() - began:.0f} s in all; seed "
            f"{arguments.seed}; {(RECIPE | more)['federation.rounds']} rounds; liver Dice on "
            f"held-out phantoms: {reference.dice:.3f} without that site, {honest.dice:.3f} with it "
            f"and no attack ({honest.honest_out + honest.bad_out} updates left out). Targets: with "
            f"the guard at most {WITHIN:.2f} below the run without that site, and that at least "
            f"{LEAST_DICE}; without the guard {', '.join(HARMFUL)} lose at least {HARM:.2f}.",
            "",
            "| it sends | with guard | its updates left out | honest updates left out | no guard | "
            "targets met |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text) if arguments.quick else write_result("attacks", text)


if __name__ == "__main__":
    main()
