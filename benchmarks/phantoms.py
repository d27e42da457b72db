"""The phantom study end to end, beside the best single HU threshold.

    python benchmarks/phantoms.py            # README's command one
    python benchmarks/phantoms.py --long     # 15 rounds, to beat the threshold clearly

Runs `flwr run` from this checkout in a FLWR_HOME of its own, from the seeded random start, three
sites of different contrast phase, and writes `benchmarks/results/<date>-phantoms[-long].md`.
The threshold is given the true liver: tumour is every voxel in it darker than t HU, with the
one t that is best over all these cases. No network gets that help.
"""

import argparse
import datetime
import os
import tempfile
from pathlib import Path

import numpy as np
from harness import processor, run, write_result

from fedseg.config import StudyConfig
from fedseg.data.held_out import server_groups
from fedseg.data.sites import Case
from fedseg.data.volumes import read_image, read_mask
from fedseg.segmentation.metrics import score

LONG = "federation.rounds=15 data.server-cases=4"


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


def main() -> None:
    """Run, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="15 rounds")
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
    write_result(f"phantoms{'-long' if arguments.long else ''}", text)


if __name__ == "__main__":
    main()
