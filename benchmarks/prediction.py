"""Prediction: FedSeg beside MONAI's default windows and beside exhaustive ones, time and Dice.

    python benchmarks/prediction.py --model runs/latest/model-best.safetensors
    python benchmarks/prediction.py            # trains README's command one first
    python benchmarks/prediction.py --quick    # smaller, to see that it runs

All contestants use one network. MONAI's way is that of its tutorials: `Spacingd`, windows of 96
voxels with overlap .25 in fp32 over the whole scan, `Invertd`. Exhaustive is windows of the
training patch with overlap .5, gaussian weights and fp32. Times are medians of runs that take turns
in one process; peak memory is that of a process of its own, seen from outside.
Writes `benchmarks/results/<date>-prediction.md`.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from harness import processor, run, watched, write_result
from monai import transforms as mt
from monai.data import decollate_batch, list_data_collate
from monai.inferers import sliding_window_inference
from torch import nn
from torch.profiler import profile

from fedseg.data.phantom import (
    FIELD_OF_VIEW_MM,
    KINDS,
    UNSEEN,
    PhantomKind,
    make_phantom,
    phantom_seeds,
)
from fedseg.data.plan import Plan
from fedseg.data.preprocess import Prepared, prepare, restore
from fedseg.data.volumes import Volume, read_image, read_mask, write_mask
from fedseg.segmentation.inference import predict_logits
from fedseg.segmentation.metrics import score
from fedseg.segmentation.model_file import load_model
from fedseg.segmentation.postprocess import clean_labels
from fedseg.segmentation.training import set_threads

CPU = torch.device("cpu")
HELD_OUT = 970
"""Phantoms come from the seeds of sites from this index on: nobody trains or chooses by them."""

AIR = -2.0
"""What MONAI pads small scans with; its own 0 is air only where intensities begin at 0."""

Laps = dict[str, float]


class Clock:
    """Seconds between calls."""

    def __init__(self) -> None:
        self.laps: Laps = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


@functools.cache
def own(network: nn.Module) -> nn.Module:
    """FedSeg lays a network out anew, in place: it gets one of its own, the others a plain one."""
    return copy.deepcopy(network)


def with_fedseg(network: nn.Module, plan: Plan, scan: Path, out: Path) -> Laps:
    """What `fedseg predict` does to one scan."""
    return between_our_own(
        plan,
        scan,
        out,
        lambda prepared: predict_logits(own(network), prepared.image, plan, device=CPU),
    )


def between_our_own(
    plan: Plan, scan: Path, out: Path, windows: Callable[[Prepared], torch.Tensor]
) -> Laps:
    """Windows of some kind between FedSeg's own reading, resampling and writing."""
    clock = Clock()
    volume = read_image(scan)
    clock.lap("read")
    prepared = prepare(volume, plan)
    clock.lap("prepare")
    logits = windows(prepared)
    clock.lap("windows")
    labels = restore(logits, prepared.placement)
    clock.lap("restore")
    write_mask(out, labels, volume)
    clock.lap("write")
    return clock.laps


def with_monai(network: nn.Module, plan: Plan, scan: Path, out: Path, *, native: bool) -> Laps:
    """The same by MONAI's transforms and default windows, at the plan's or the scan's spacing."""
    low, high = plan.ct_window
    clock = Clock()
    load = mt.Compose(
        [mt.LoadImaged("image", reader="NibabelReader"), mt.EnsureChannelFirstd("image")]
    )
    steps: list = [mt.Orientationd("image", axcodes="RAS", labels=None)]
    if not native:
        steps.append(mt.Spacingd("image", pixdim=plan.spacing, mode="bilinear"))
    steps.append(mt.ScaleIntensityRanged("image", low, high, -2, 2, clip=True))
    before = mt.Compose(steps)
    data = load({"image": str(scan)})
    clock.lap("read")
    data = list_data_collate([before(data)])
    clock.lap("prepare")
    with torch.inference_mode():
        data["pred"] = sliding_window_inference(
            data["image"], (96, 96, 96), 4, network, 0.25, cval=AIR
        )
    clock.lap("windows")
    (data,) = decollate_batch(data)
    back = mt.Compose(
        [
            mt.Invertd("pred", before, orig_keys="image", nearest_interp=False, to_tensor=True),
            mt.AsDiscreted("pred", argmax=True),
        ]
    )
    data = back(data)
    clock.lap("restore")
    name = out.name.removesuffix(".nii.gz")
    save = mt.SaveImage(
        out.parent, "", ".nii.gz", output_dtype=np.uint8, separate_folder=False, print_log=False
    )
    save.set_options(init_kwargs={"verbose": False})
    save(data["pred"], filename=out.parent / name)
    clock.lap("write")
    return clock.laps


def exhaustive(network: nn.Module, prepared: Prepared, plan: Plan) -> torch.Tensor:
    """Training-size windows, overlap .5, gaussian, fp32."""
    return plain_windows(network, prepared.image, plan.patch_size, overlap=0.5, mode="gaussian")


def plain_windows(
    network: nn.Module, image: np.ndarray, size: tuple[int, ...], *, overlap: float, mode: str
) -> torch.Tensor:
    """MONAI's windows in fp32, as it lays them."""
    volume = torch.from_numpy(image)[None, None]
    with torch.inference_mode():
        return sliding_window_inference(volume, size, 4, network, overlap, mode, cval=AIR)[0]


def with_exhaustive(network: nn.Module, plan: Plan, scan: Path, out: Path) -> Laps:
    """Exhaustive windows between FedSeg's own reading, resampling and writing."""
    return between_our_own(plan, scan, out, lambda prepared: exhaustive(network, prepared, plan))


def native(plan: Plan, scan: Path) -> Plan:
    """The plan at the scan's own spacing."""
    header = nib.load(scan).header
    return plan.model_copy(update={"spacing": tuple(float(mm) for mm in header.get_zooms())})


CONTESTANTS: dict[str, Callable[[nn.Module, Plan, Path, Path], Laps]] = {
    "MONAI default, plan's spacing": lambda n, p, s, o: with_monai(n, p, s, o, native=False),
    "exhaustive, plan's spacing": with_exhaustive,
    "FedSeg": with_fedseg,
    "MONAI default, scan's own spacing": lambda n, p, s, o: with_monai(n, p, s, o, native=True),
    "FedSeg, scan's own spacing": lambda n, p, s, o: with_fedseg(n, native(p, s), s, o),
}


def write_phantom(folder: Path, shape: tuple[int, int, int]) -> tuple[Path, Path]:
    """A portal phantom on a grid of this shape, image and mask, stored as LPS."""
    spacing = tuple(mm / n for mm, n in zip(FIELD_OF_VIEW_MM, shape, strict=True))
    kind = dataclasses.replace(KINDS["portal"], spacing=spacing, orientation="LPS")
    phantom = make_phantom(kind, phantom_seeds(0, HELD_OUT + 40, 1)[0])
    assert phantom.image.shape == shape
    name = "x".join(map(str, shape))
    paths = folder / f"{name}.nii.gz", folder / f"{name}.mask.nii.gz"
    for path, array in zip(paths, (phantom.image, phantom.mask), strict=True):
        nib.save(nib.Nifti1Image(array, phantom.affine), path)
    return paths


def lengthened(scan: Path, slices: int) -> Path:
    """The scan there and back again along z, until it has so many slices."""
    image = nib.load(scan)
    array = np.asanyarray(image.dataobj)
    there = np.arange(array.shape[2])
    array = array[:, :, np.resize(np.r_[there, there[::-1]], slices)]
    longer = scan.with_name(f"{'x'.join(map(str, array.shape))}.nii.gz")
    nib.save(nib.Nifti1Image(array, image.affine), longer)
    return longer


def dices(found: np.ndarray, truth: np.ndarray) -> list[float]:
    """Dice of liver and tumour; NaN where there is none."""
    results = []
    for lowest in (1, 2):
        a, b = found >= lowest, truth >= lowest
        tp = int((a & b).sum())
        value = score(tp, int(a.sum()) - tp, int(b.sum()) - tp).get("dice")
        results.append(float("nan") if value is None else float(value))
    return results


def as_volume(kind: PhantomKind, seed: int) -> tuple[Volume, np.ndarray]:
    """A phantom as it is read from its file, without the file."""
    phantom = make_phantom(kind, seed)
    turn = (slice(None, None, -1),) * 2 if kind.orientation == "LPS" else ()
    image, mask = (np.ascontiguousarray(a[turn]) for a in (phantom.image, phantom.mask))
    volume = Volume(
        array=image.astype(np.float32),
        spacing=kind.spacing,
        stored=None,
        stored_shape=image.shape,
        stored_affine=phantom.affine,
    )
    return volume, mask


def windows_table(network: nn.Module, plan: Plan, per_kind: int) -> list[str]:
    """Dice of each way to lay windows, on held-out phantoms, and its seconds for the windows."""

    def larger(side: int) -> Plan:
        return plan.model_copy(update={"inference_patch": (side,) * 3})

    def whole(prepared: Prepared) -> Plan:
        sides = tuple(-(-n // 16) * 16 for n in prepared.image.shape)
        return plan.model_copy(update={"inference_patch": sides})

    def ours(prepared: Prepared, changed: Plan, **options: Any) -> torch.Tensor:
        return predict_logits(own(network), prepared.image, changed, device=CPU, **options)

    def monai(image: np.ndarray, side: int, overlap: float, mode: str) -> torch.Tensor:
        return plain_windows(network, image, (side,) * 3, overlap=overlap, mode=mode)

    side = max(plan.patch_size)
    ways: dict[str, Callable[[Prepared], torch.Tensor]] = {
        "exhaustive": lambda p: exhaustive(network, p, plan),
        "FedSeg": lambda p: ours(p, plan),
        "FedSeg, fp32": lambda p: ours(p, plan, precision="fp32"),
        "FedSeg, flips x": lambda p: ours(p, plan, flips=(0,)),
        "FedSeg, flips xyz": lambda p: ours(p, plan, flips=(0, 1, 2)),
        f"MONAI, {side}^3, overlap .25, gaussian": lambda p: monai(p.image, side, 0.25, "gaussian"),
        "MONAI default windows (96^3, overlap .25), cropped": lambda p: monai(
            p.image, 96, 0.25, "constant"
        ),
        "FedSeg, 80^3": lambda p: ours(p, larger(80)),
        "FedSeg, 96^3": lambda p: ours(p, larger(96)),
        "FedSeg, whole body at once": lambda p: ours(p, whole(p)),
    }
    cleaned = {
        "FedSeg, largest liver": {"largest_liver": True, "tumor_in_liver": False},
        "FedSeg, largest liver, tumours in it": {"largest_liver": True, "tumor_in_liver": True},
    }
    dice: dict[str, list[list[float]]] = {name: [] for name in (*ways, *cleaned)}
    seconds: dict[str, list[float]] = {name: [] for name in dice}
    for site, kind in enumerate([*list(KINDS.values())[:3], UNSEEN]):
        for seed in phantom_seeds(0, HELD_OUT + site, per_kind):
            scan, truth = as_volume(kind, seed)
            prepared = prepare(scan, plan)
            for name, way in ways.items():
                began = time.perf_counter()
                logits = way(prepared)
                seconds[name].append(time.perf_counter() - began)
                labels = restore(logits, prepared.placement)
                dice[name].append(dices(labels, truth))
                for other, how in cleaned.items() if name == "FedSeg" else ():
                    began = time.perf_counter()
                    dice[other].append(dices(clean_labels(labels, **how), truth))
                    seconds[other].append(seconds[name][-1] + time.perf_counter() - began)
    rows = ["| windows | seconds | liver Dice | against exhaustive | tumour Dice | against |"]
    rows.append("|---|---|---|---|---|---|")
    base = np.array(dice["exhaustive"])
    for name in dice:
        found = np.array(dice[name])
        apart = 100 * np.nanmean(found - base, 0)
        error = 100 * np.nanstd(found - base, 0) / len(found) ** 0.5
        cells = [
            f"{np.nanmean(found[:, column]):.3f} | {apart[column]:+.1f} ± {error[column]:.1f}"
            for column in (0, 1)
        ]
        rows.append(f"| {name} | {statistics.median(seconds[name]):.2f} | {' | '.join(cells)} |")
    return rows


def race(
    network: nn.Module, plan: Plan, scan: Path, mask: Path, model: Path, repeats: int
) -> list[str]:
    """All contestants in turn on one file, then each in a process of its own, for its memory."""
    truth = read_mask(mask).array
    laps: dict[str, list[Laps]] = {name: [] for name in CONTESTANTS}
    out = scan.with_name("found.nii.gz")
    for repeat in range(repeats + 1):  # the first warms up
        for name, contestant in CONTESTANTS.items():
            found = contestant(network, plan, scan, out)
            laps[name] += [found] if repeat else []
    rows = [
        "| | windows, s | against MONAI | file to file, s | against MONAI | peak, GB | liver | "
        "tumour |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base: tuple[float, float] = (0, 0)
    for name, contestant in CONTESTANTS.items():
        contestant(network, plan, scan, out)
        liver, tumor = dices(read_mask(out).array, truth)
        command = [sys.executable, __file__, "--child", name, "--model", model, "--scan", scan]
        _, peak = watched(command)
        windows = statistics.median(lap["windows"] for lap in laps[name])
        whole = statistics.median(sum(lap.values()) for lap in laps[name])
        base = (windows, whole) if name.startswith("MONAI") else base
        rows.append(
            f"| {name} | {windows:.2f} | {base[0] / windows:.1f}x | {whole:.2f} | "
            f"{base[1] / whole:.1f}x | {peak:.2f} | {liver:.3f} | {tumor:.3f} |"
        )
    rows += ["", "| seconds | " + " | ".join(CONTESTANTS) + " |", "|---|" + "---|" * 5]
    for step in ("read", "prepare", "windows", "restore", "write"):
        medians = [statistics.median(lap[step] for lap in laps[name]) for name in CONTESTANTS]
        rows.append(f"| {step} | " + " | ".join(f"{seconds:.2f}" for seconds in medians) + " |")
    return rows


def command_table(model: Path, scans: list[Path]) -> list[str]:
    """`fedseg predict` from its start to its end."""
    rows = ["| scan | MB | options | seconds | peak memory, GB |", "|---|---|---|---|---|"]
    for scan in scans:
        for options in ("", "--overlay --tumor-in-liver", "--flips xyz"):
            command = [Path(sys.executable).parent / "fedseg", "predict", scan, "--model", model]
            with tempfile.TemporaryDirectory() as out:
                seconds, peak = watched([*command, "-o", out, *options.split()])
            size = scan.stat().st_size / 1e6
            name = scan.name.removesuffix(".nii.gz")
            rows.append(f"| {name} | {size:.0f} | {options} | {seconds:.1f} | {peak:.2f} |")
    return rows


def profile_table(network: nn.Module, plan: Plan, scan: Path) -> list[str]:
    """Where one prediction's time goes: the steps, then torch's own operations."""
    out = scan.with_name("found.nii.gz")
    with_fedseg(network, plan, scan, out)
    with profile() as seen:
        laps = with_fedseg(network, plan, scan, out)
    total = sum(laps.values())
    steps = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in laps.items())
    rows = [f"Steps: {steps} of {total:.2f} s.", "", "| operation | calls | ms | share |"]
    rows.append("|---|---|---|---|")
    events = sorted(seen.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    for event in events[:12]:
        ms = event.self_cpu_time_total / 1000
        rows.append(f"| {event.key} | {event.count} | {ms:.0f} | {ms / total / 10:.0f}% |")
    return rows


def trained(scratch: Path) -> Path:
    """Train README's command one."""
    run("data.server-cases=1", scratch)
    return scratch / "runs" / "latest" / "model-last.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model file; else one is trained")
    parser.add_argument("--quick", action="store_true", help="few and small, writes no result")
    parser.add_argument("--child", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_threads(None)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.child:
            CONTESTANTS[options.child](
                *load_model(options.model), options.scan, scratch / "o.nii.gz"
            )
            return
        model = options.model or trained(scratch)
        network, plan = load_model(model)
        network.eval()
        small = (128, 128, 64) if options.quick else (256, 256, 128)
        large = (256, 256, 65) if options.quick else (512, 512, 129)
        scan, mask = write_phantom(scratch, small)
        big, _ = write_phantom(scratch, large)
        per_kind, repeats = (1, 1) if options.quick else (4, 5)
        raced = race(network, plan, scan, mask, model, repeats)
        laid = windows_table(network, plan, per_kind)
        longest = lengthened(big, 100 if options.quick else 555)
        commands = command_table(model, [scan, big, longest])
        profiled = profile_table(network, plan, big)
    text = "\n".join(
        [
            f"# Prediction, {datetime.date.today()}",
            "",
            f"{processor()}; torch {torch.__version__}; one network (`{plan.model}`, width "
            f"{plan.width}, trained on patches {plan.patch_size}), planned spacing {plan.spacing} "
            f"mm; medians of {repeats} runs in turn.",
            "",
            f"## A phantom of {small}, file to file",
            *raced,
            "",
            f"## How windows are laid, {4 * per_kind} held-out phantoms, cropped to the body",
            *laid,
            "",
            "## `fedseg predict`, start of Python included",
            *commands,
            "",
            f"## Profile of one prediction, {large}",
            *profiled,
            "",
        ]
    )
    print(text) if options.quick else write_result("prediction", text)


if __name__ == "__main__":
    main()
