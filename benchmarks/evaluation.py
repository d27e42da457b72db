"""How long scoring takes: a full CT with all metrics, and surface distances beside the network.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --worst        # also a prediction scattered all over the CT
    python benchmarks/evaluation.py --no-result    # print only

A 512 x 512 x 129 mask of 0.7 x 0.7 x 2.5 mm with a liver of 1.5 L and 7 tumours, and a prediction
with shifted borders, a smaller and a false tumour; the worst one is pieces all over the volume, as
from a network without training. Each is scored in memory, then the first by
`fedseg evaluate --predictions` from files, start of Python included. Then a phantom case: its
sliding window with README's network, and its scores with and without surface distances. Writes
`benchmarks/results/<date>-evaluation.md`.
"""

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from harness import processor, watched, write_result
from scipy import ndimage

from fedseg.config import StudyConfig
from fedseg.data.cache import cached_case
from fedseg.data.phantom import KINDS, write_phantom_site
from fedseg.data.planning import make_plan
from fedseg.data.preprocess import restore
from fedseg.data.sites import find_cases
from fedseg.segmentation.inference import predict_logits
from fedseg.segmentation.metrics import Scoring, summarise, sums_of_case
from fedseg.segmentation.models import build_model

SHAPE, SPACING = (512, 512, 129), (0.7, 0.7, 2.5)
TARGET_SECONDS = 15
TUMORS = [
    ((110, 160, 150), 25),
    ((160, 200, 170), 16),
    ((190, 150, 165), 8),
    ((120, 210, 160), 6),
    ((150, 140, 180), 12),
    ((175, 180, 140), 4),
    ((140, 180, 190), 9),
    ((130, 150, 140), 30),
]
"""Centre and radius in mm; two touch and are one lesion."""


def ellipsoid(centre: tuple[float, ...], axes: tuple[float, ...]) -> np.ndarray:
    """Bool `SHAPE`; centre and semi-axes in mm."""
    x, y, z = (
        ((np.arange(n) * step - c) / a) ** 2
        for n, step, c, a in zip(SHAPE, SPACING, centre, axes, strict=True)
    )
    return x[:, None, None] + y[:, None] + z < 1


def masks(worst: bool) -> dict[str, np.ndarray]:
    """The mask, and one or two predictions of it: uint8 `SHAPE`."""
    truth = ellipsoid((150, 180, 160), (90, 75, 53)).astype(np.uint8)
    prediction = ellipsoid((152, 181, 158), (89, 77, 54)).astype(np.uint8)
    for number, (centre, radius) in enumerate(TUMORS):
        truth[ellipsoid(centre, (radius,) * 3)] = 2
        if number:
            prediction[ellipsoid(tuple(c + 1 for c in centre), (radius,) * 3)] = 2
    prediction[ellipsoid((200, 190, 160), (7, 7, 7))] = 2
    if not worst:
        return {"mask": truth, "close": prediction}
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE, dtype=np.float32), 2)
    bad = np.digitize(noise, np.quantile(noise[::4, ::4, ::4], [0.7, 0.95])).astype(np.uint8)
    return {"mask": truth, "close": prediction, "all over": bad}


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Least of the repeats."""
    found = []
    for _ in range(repeats):
        began = time.monotonic()
        work()
        found.append(time.monotonic() - began)
    return min(found)


def command(folder: Path, found: dict[str, np.ndarray]) -> tuple[float, float]:
    """Seconds and peak memory (GB) of `fedseg evaluate --predictions` on one case."""
    affine = np.diag([*SPACING, 1.0])
    image = np.where(found["mask"] > 0, 100, -50).astype(np.int16)
    image += np.random.default_rng(1).normal(0, 20, SHAPE).astype(np.int16)
    for part, array in (
        ("images", image),
        ("masks", found["mask"]),
        ("predictions", found["close"]),
    ):
        (folder / part).mkdir()
        nib.save(nib.Nifti1Image(array, affine), folder / part / "case.nii.gz")
    program = Path(sys.executable).parent / "fedseg"
    return watched([program, "evaluate", "--predictions", folder / "predictions", folder, "--json"])


def phantom(folder: Path) -> tuple[float, float, float]:
    """Seconds of one phantom case: sliding window and restoring; scores without, with distances."""
    write_phantom_site(folder / "site", KINDS["portal"], [0], name="site")
    (listed,) = find_cases(folder / "site").cases
    study = StudyConfig.from_run_config({"train.patch-size": "64,64,64", "train.spacing": "3,3,3"})
    plan = make_plan(study)
    case = cached_case(listed, plan, folder / "cache")
    network, device = build_model(plan, seed=0), torch.device("cpu")

    def predict() -> np.ndarray:
        return restore(predict_logits(network, case.image, plan, device=device), case.placement)

    window = seconds(predict)
    # A random network's mask is the worst case; a trained one's is like the truth.
    labels = np.roll(case.truth, (2, 1, 1), (0, 1, 2))
    scored = [
        seconds(
            lambda asked=asked: sums_of_case(
                labels,
                case.truth,
                spacing=case.placement.spacing,
                scoring=Scoring(distances=asked),
            )
        )
        for asked in (False, True)
    ]
    return window, scored[0], scored[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-result", action="store_true", help="print only")
    parser.add_argument("--worst", action="store_true", help="also the worst prediction")
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    found = masks(options.worst)
    litres = np.count_nonzero(found["mask"]) * np.prod(SPACING) / 1e6
    rows = []
    for name in [name for name in found if name != "mask"]:
        sums: dict[str, float] = {}

        def scored(asked: bool, name: str = name, sums: dict[str, float] = sums) -> None:
            scoring = Scoring(distances=asked)
            sums |= sums_of_case(found[name], found["mask"], spacing=SPACING, scoring=scoring)

        repeats = 3 if name == "close" else 1
        short, took = (
            seconds(lambda asked=asked, scored=scored: scored(asked), repeats)
            for asked in (False, True)
        )
        what = summarise(sums)
        rows.append(
            f"| {name} | {took:.1f} | {short:.1f} | {what['liver.dice']:.3f} | "
            f"{what['liver.hd95']:.1f} | {what['tumor.lesions_found']} of {what['tumor.lesions']}, "
            f"{what['tumor.lesions_false']} false |"
        )
    with tempfile.TemporaryDirectory() as scratch:
        took, memory = command(Path(scratch), found)
        window, without, with_them = phantom(Path(scratch))
    text = (
        f"# Scoring, {datetime.date.today()}\n\n{processor()}; {torch.get_num_threads()} threads; "
        f"least of 3, `all over` once; {' x '.join(map(str, SHAPE))}, liver of {litres:.2f} L, "
        f"{what['tumor.lesions']} tumours; target {TARGET_SECONDS} s\n\n"
        "| prediction | seconds | without distances | liver Dice | HD95, mm | lesions |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"`fedseg evaluate --predictions` on that case from .nii.gz files, whole command, once: "
        f"{took:.1f} s, {memory:.2f} GB.\n\n"
        f"One phantom case, {window:.2f} s for its sliding window (patch 64, 3 mm, width 16): "
        f"scored in {without:.3f} s without surface distances, {with_them:.3f} s with them, which "
        f"is {without / window:.0%} and {with_them / window:.0%} of the window's time.\n"
    )
    print(text) if options.no_result else write_result("evaluation", text)


if __name__ == "__main__":
    main()
