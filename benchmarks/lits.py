"""A federation on LiTS or MSD Task03, beside the best published one. *Not yet run on LiTS.*

    python benchmarks/lits.py DIR --out lits-run                  # as ConDistFL trained
    python benchmarks/lits.py DIR --out lits-run --rounds 20 --steps 250 -c 'train.batch-size=4'
    python benchmarks/lits.py DIR --out lits-run --phantoms 131   # writes them into DIR first

DIR is LiTS (volume-N.nii and segmentation-N.nii, its training part of 131 scans) or Task03_Liver
of the Medical Segmentation Decathlon, the same scans. Writes `OUT/sites/site-N` and `OUT/held-out`
with links to the scans, runs `flwr run` over them and scores the best model on what was held out.
The bar to beat is the global model of ConDistFL (Wang et al., arXiv 2308.04070; numbers from
NVFlare's research/condist-fl): mean Dice over cases .9556 for the liver, .6822 for tumours.

As there: the same 26 test scans, four sites, 120 rounds of 1000 steps, partial labels. Not as
there: ConDistFL's other three sites hold spleens, pancreases and kidneys of other data sets and
annotate no liver. Here the 105 other scans are dealt to all sites, and every second site annotates
the liver only, its tumours counting as liver. A folder that isn't all of LiTS holds out every fifth
scan. Phantoms named as LiTS names its scans, at 4 mm, show that all of this runs, and nothing about
LiTS.
"""

import argparse
import datetime
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
from harness import processor, run, write_result

from fedseg.data.cases import Case, nifti_stem
from fedseg.data.partition import partition
from fedseg.data.phantom import KINDS, make_phantom
from fedseg.data.sites import find_cases
from fedseg.report.table import lesion_table, scores_table
from fedseg.segmentation.evaluation import FolderScores, evaluate_folder
from fedseg.segmentation.model_file import load_model
from fedseg.segmentation.training import choose_device, set_threads

BAR = {"liver": 0.9556, "tumor": 0.6822}
SCANS = 131
CONDISTFL_TEST = (
    *(3, 9, 10, 21, 24, 34, 39, 50, 51, 52, 60, 65, 69, 72, 80, 81, 82, 83, 91, 97, 99),
    *(100, 111, 112, 114, 122),
)
LIVER_ONLY = 'labels = "liver"\n\n[label-map]\n1 = "liver"\n2 = "liver"\n'
BOTH = 'labels = "liver,tumor"\n'


def write_phantoms(folder: Path, count: int) -> None:
    """Write phantoms as LiTS's training part lies on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = replace(KINDS["portal"], spacing=(4.0, 4.0, 4.0))
    for number in range(count):
        phantom = make_phantom(kind, number)
        for name, array in (("volume", phantom.image), ("segmentation", phantom.mask)):
            nib.save(nib.Nifti1Image(array, phantom.affine), folder / f"{name}-{number}.nii")


def number_of(case: Case) -> int:
    """N of `volume-N.nii` or `liver_N.nii.gz`."""
    found = re.search(r"(\d+)$", nifti_stem(case.image) or "")
    if found is None:
        raise SystemExit(f"{case.image}: no number in its name; expected LiTS or MSD Task03")
    return int(found.group(1))


def split(cases: Sequence[Case], sites: int, seed: int) -> tuple[list[list[Case]], list[Case]]:
    """Deal cases to sites; return each site's, and those held out."""
    ordered = sorted(cases, key=number_of)
    if len(ordered) == SCANS:
        held_out = [case for case in ordered if number_of(case) in CONDISTFL_TEST]
    else:
        held_out = ordered[::5]
    rest = [case for case in ordered if case not in held_out]
    shares = partition("iid", [0.0] * len(rest), sites=sites, alpha=1.0, seed=seed)
    return [[rest[n] for n in share] for share in shares], held_out


def write_folder(folder: Path, cases: Sequence[Case], labels: str) -> None:
    """Write a site's folder of links, and its site.toml."""
    for case in cases:
        for part, path in (("images", case.image), ("masks", case.mask)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            ending = path.name[len(nifti_stem(path) or "") :]
            link = folder / part / f"case-{number_of(case):03d}{ending}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    policy = "[policy]\nmin-count = 1  # public scans\n"
    (folder / "site.toml").write_text(
        f'name = "{folder.name}"\nlayout = "images-masks"\nmodality = "ct"\n{labels}\n{policy}'
    )


def prepare(data: Path, out: Path, *, sites: int, seed: int) -> tuple[int, int]:
    """Write `OUT/sites` and `OUT/held-out`; return the number of cases in each."""
    cases = find_cases(data).cases
    shares, held_out = split(cases, sites, seed)
    for index, share in enumerate(shares):
        labels = LIVER_ONLY if index % 2 else BOTH
        write_folder(out / "sites" / f"site-{index}", share, labels)
    write_folder(out / "held-out", held_out, BOTH)
    return len(cases) - len(held_out), len(held_out)


def score(out: Path) -> FolderScores:
    """Score the best model of the run on what was held out."""
    set_threads(None)
    network, plan = load_model(out / "runs" / "latest" / "model-best.safetensors")
    return evaluate_folder(network, plan, out / "held-out", device=choose_device("auto"))


def report(scores: FolderScores, head: str, *, phantoms: bool) -> str:
    """Show the scores beside the bar."""
    title = "Phantoms in LiTS's shape, not LiTS" if phantoms else "LiTS"
    rows = [
        f"# {title}, {datetime.date.today()}\n\n{head}\n",
        "| region | Dice per case | 95% interval | pooled | ConDistFL's global model, on LiTS |",
        "|---|---|---|---|---|",
    ]
    found = scores.all
    for region, bar in BAR.items():
        key = f"{region}.dice"
        mean, pooled = (
            "-" if found[k] is None else f"{found[k]:.4f}" for k in (key, f"{key}.pooled")
        )
        ends = scores.intervals.get(key)
        shown = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "-"
        rows.append(f"| {region} | {mean} | {shown} | {pooled} | {bar} |")
    tables = scores_table("Held out", found, scores.intervals)
    tables += lesion_table("Tumours, one by one", found, scores.intervals)
    return "\n".join(rows) + f"\n\n```\n{tables}```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="LiTS or Task03_Liver")
    parser.add_argument("--out", type=Path, default=Path("lits-run"), help="sites and runs go here")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--steps", type=int, default=1000, help="a round")
    parser.add_argument("--phantoms", type=int, default=0, help="write so many into DIR first")
    parser.add_argument("-c", default="", help="more study config, as for flwr run")
    options = parser.parse_args()
    out = options.out.absolute()
    if options.phantoms:
        write_phantoms(options.data.expanduser(), options.phantoms)
    trained, held_out = prepare(
        options.data.expanduser(), out, sites=options.sites, seed=options.seed
    )
    study = (
        f'data.source="folder" data.partition="folders" data.dir="{out / "sites"}" '
        f"federation.rounds={options.rounds} train.steps-per-epoch={options.steps} {options.c}"
    ).strip()
    seconds, _ = run(study, out, sites=options.sites)
    head = (
        f"{processor()}; {trained} scans at {options.sites} sites, {held_out} held out; "
        f"{options.rounds} rounds of {options.steps} steps, {seconds:.0f} s; "
        f"more options: `{options.c or 'none'}`"
    )
    text = report(score(out), head, phantoms=bool(options.phantoms))
    if trained + held_out == SCANS:
        write_result("lits-phantoms" if options.phantoms else "lits", text)
    else:
        print(f"{text}\nNot all of LiTS: not a result.")


if __name__ == "__main__":
    main()
