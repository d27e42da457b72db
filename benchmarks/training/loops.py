"""Whole training loops that do the same steps: the limit, FedSeg's, and MONAI's two ways.

Each is a function that trains some steps and returns; its network and data live on between calls.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from harness import cached_scan, synthetic_scan
from monai.data import CacheDataset, DataLoader, Dataset, set_track_meta
from monai.losses import DiceCELoss
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    FgBgToIndicesd,
    LoadImaged,
    RandAdjustContrastd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandShiftIntensityd,
    ScaleIntensityRanged,
    SelectItemsd,
)
from training_network import build

from fedseg.data.patches import batches
from fedseg.sections import TrainConfig
from fedseg.segmentation.layers import swap_layers
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.training import fit, log_progress, make_optimizer

SHAPE = (256, 256, 128)
SIZE = (64, 64, 64)
REGIONS = ("liver", "tumor")
Loop = Callable[[int], None]
CONFIG = TrainConfig()


def limit(folder: Path, cases: int) -> Loop:
    """The same steps on tensors in memory: a bare loop, both formats, no progress."""
    network = swap_layers(build()[0]).train()
    optimizer = make_optimizer(network, CONFIG)
    drawn = list(draw(folder, cases, 8, "none"))

    def run(steps: int) -> None:
        for step in range(steps):
            image, labels = drawn[step % len(drawn)]
            image = image.contiguous(memory_format=torch.channels_last_3d)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = network(image)
            loss = dice_ce(logits, labels, REGIONS)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), CONFIG.max_grad_norm)
            optimizer.step()

    return run


def draw(
    folder: Path, cases: int, steps: int, augmentation: str, seed: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """FedSeg's batches from cached cases."""
    return batches(
        [cached_scan(folder / str(number), SHAPE, number) for number in range(cases)],
        steps=steps,
        batch_size=2,
        patch_size=SIZE,
        foreground=0.67,
        augmentation=augmentation,
        rng=np.random.default_rng(seed),
    )


def fedseg(folder: Path, cases: int, augmentation: str) -> Loop:
    """FedSeg as a site runs it: patches from the cache, augmentation, `fit`, log lines."""
    network, _ = build()
    optimizer = make_optimizer(network, CONFIG)
    rounds = iter(range(1, 10_000))

    def run(steps: int) -> None:
        number = next(rounds)
        fit(
            network,
            draw(folder, cases, steps, augmentation, seed=number),
            dice_ce,
            CONFIG,
            steps=steps,
            round_number=number,
            rounds=10_000,
            optimizer=optimizer,
            on_step=log_progress("benchmark", number),
        )

    return run


def write_niftis(folder: Path, cases: int) -> list[dict[str, str]]:
    """The same scans as `.nii.gz`."""
    listed = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        paths = {name: str(folder / f"{name}-{number}.nii.gz") for name in ("image", "label")}
        if not all(Path(path).exists() for path in paths.values()):
            arrays = synthetic_scan(SHAPE, number)
            for path, array in zip(paths.values(), arrays, strict=True):
                nib.save(nib.Nifti1Image(array, np.eye(4)), path)
        listed.append(paths)
    return listed


_LOAD = [
    LoadImaged(("image", "label")),
    EnsureChannelFirstd(("image", "label"), channel_dim="no_channel"),
    ScaleIntensityRanged("image", a_min=-90, a_max=190, b_min=-2, b_max=2, clip=True),
]


def _augment() -> list[object]:
    return [
        RandFlipd(("image", "label"), prob=0.5, spatial_axis=1),
        RandFlipd(("image", "label"), prob=0.5, spatial_axis=2),
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        RandShiftIntensityd("image", prob=1.0, offsets=0.3),
        RandGaussianNoised("image", prob=0.3, std=0.1),
    ]


def tutorial(niftis: list[dict[str, str]]) -> Loop:
    """As MONAI's tutorials begin: `Dataset`, read and crop at each access, fp32, Adam."""
    crop = RandCropByPosNegLabeld(("image", "label"), "label", SIZE, pos=2, neg=1, num_samples=1)
    data = Dataset(niftis, Compose([*_LOAD, crop, *_augment()]))
    return _monai(data, both_formats=False)


def tuned(niftis: list[dict[str, str]]) -> Loop:
    """MONAI at its best: everything cached, foreground indices precomputed, bf16, channels last."""
    keys = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"}
    crop = RandCropByPosNegLabeld(
        ("image", "label"), "label", SIZE, pos=2, neg=1, num_samples=1, **keys
    )
    indices = FgBgToIndicesd("label")
    only = SelectItemsd(("image", "label"))
    set_track_meta(False)
    try:
        data = CacheDataset(
            niftis,
            Compose([*_LOAD, indices, crop, only, *_augment()]),
            copy_cache=False,
            progress=False,
        )
    finally:
        set_track_meta(True)
    return _monai(data, both_formats=True)


def _monai(data: Dataset, *, both_formats: bool) -> Loop:
    network, _ = build(channels_last=both_formats)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)

    def endless() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from DataLoader(data, batch_size=2, shuffle=True, drop_last=True)

    stream = endless()

    def run(steps: int) -> None:
        set_track_meta(not both_formats)
        network.train()
        for _ in range(steps):
            batch = next(stream)
            image, labels = batch["image"], batch["label"]
            if both_formats:
                image = image.contiguous(memory_format=torch.channels_last_3d)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=both_formats):
                logits = network(image)
            loss = criterion(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        set_track_meta(True)

    return run
