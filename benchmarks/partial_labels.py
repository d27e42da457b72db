"""Do sites that annotate only the liver help with tumours, and what does it cost to ignore it?

    python benchmarks/partial_labels.py [--seeds 1]

Four phantom sites of one size; the masks of two hold no tumour (label 2 became 1). Three studies of
the same rounds, scored on the same held-out phantoms:

- marginal: those two sites say `labels = "liver"`, so the loss merges what they can't tell apart;
- naive: they claim `labels = "liver,tumor"`, so their tumours count as liver;
- without: only the two sites with tumour masks.
"""

import argparse
import datetime
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from harness import processor, run, write_result

from fedseg.data.phantom import KINDS, phantom_seeds, write_phantom_site

KINDS_OF_SITES = ("portal", "native", "portal", "native")
LIVER_ONLY = (2, 3)
CASES, HELD_OUT = 12, 4


def write_sites(root: Path, seed: int, sites: range, labels: str) -> None:
    """Write the sites' folders; `labels` is what the liver-only sites claim to annotate."""
    for site in sites:
        folder = root / f"site-{site}"
        seeds = phantom_seeds(seed, site, CASES)
        write_phantom_site(folder, KINDS[KINDS_OF_SITES[site]], seeds, name=f"site-{site}")
        if site in LIVER_ONLY:
            forget_tumours(folder)
            text = (folder / "site.toml").read_text()
            (folder / "site.toml").write_text(text.replace("liver,tumor", labels))


def forget_tumours(folder: Path) -> None:
    """Turn label 2 into 1 in every mask."""
    for path in (folder / "masks").iterdir():
        mask = nib.load(path)
        liver = (np.asanyarray(mask.dataobj) > 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(liver, mask.affine, mask.header), path)


def study(name: str, seed: int, options: str) -> dict:
    """Run one of the three studies; return the last round's global metrics."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sites = range(2) if name == "without" else range(4)
        write_sites(
            scratch / "sites", seed, sites, "liver" if name == "marginal" else "liver,tumor"
        )
        for index, kind in enumerate(dict.fromkeys(KINDS_OF_SITES)):
            seeds = phantom_seeds(seed, 900 + index, HELD_OUT)
            write_phantom_site(scratch / "held-out", KINDS[kind], seeds, name="held-out")
        config = f'data.source="folder" data.partition="folders" data.dir="{scratch / "sites"}" '
        config += f'data.server-dir="{scratch / "held-out"}" train.seed={seed} {options}'
        _, history = run(config, scratch, sites=len(sites))
        return history[-1]["global"]


def main() -> None:
    """Run, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("-c", default="federation.evaluate-every=3", help="more study config")
    arguments = parser.parse_args()
    rows = [
        f"# Partial labels, {datetime.date.today()}",
        "",
        f"{processor()}; {arguments.seeds} seed(s); options: `{arguments.c}`; "
        f"{2 * HELD_OUT} held-out phantoms a seed, mean over cases",
        "",
        "| two sites without tumour masks | liver Dice | tumour Dice | by seed |",
        "|---|---|---|---|",
    ]
    for name in ("marginal", "naive", "without"):
        found = [study(name, seed, arguments.c) for seed in range(arguments.seeds)]
        liver = np.mean([f["liver.dice"] for f in found])
        tumors = [f["tumor.dice"] or 0.0 for f in found]
        each = ", ".join(f"{value:.3f}" for value in tumors)
        rows.append(f"| {name} | {liver:.3f} | {np.mean(tumors):.3f} | {each} |")
    write_result("partial-labels", "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
