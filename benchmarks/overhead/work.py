"""The client work that every rival does: one network, some steps on patches that lie ready.

The same network, number formats, loss, optimiser and patch size as FedSeg's sites have. What
`OVERHEAD_*` in the environment says is the benchmark's choice for one run.
"""

import os
import time
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import UNet
from torch.nn import functional

STEPS = int(os.environ.get("OVERHEAD_STEPS", "1"))
ROUNDS = int(os.environ.get("OVERHEAD_ROUNDS", "3"))
SITES = int(os.environ.get("OVERHEAD_SITES", "2"))
BATCH = 2


UNET = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": (16, 32, 64, 128, 256),
    "strides": (2, 2, 2, 2),
    "num_res_units": 2,
    "norm": ("instance", {"affine": True}),
}


def build() -> torch.nn.Module:
    """The U-Net that FedSeg's default plan has: 4.8M parameters."""
    return UNet(**UNET).to(memory_format=torch.channels_last_3d)


def train(network: torch.nn.Module, site: int, round_number: int) -> float:
    """Train in place for `STEPS` steps; return the mean loss."""
    folder = Path(os.environ["OVERHEAD_PATCHES"])
    images = np.load(folder / f"images-{site}.npy", mmap_mode="r", allow_pickle=False)
    labels = np.load(folder / f"labels-{site}.npy", mmap_mode="r", allow_pickle=False)
    rng = np.random.default_rng([site, round_number])
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network.train()
    total = 0.0
    for _ in range(STEPS):
        chosen = rng.choice(len(images), BATCH, replace=False)
        image = torch.from_numpy(images[chosen]).float()[:, None]
        truth = torch.from_numpy(labels[chosen]).long()
        image = image.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = network(image)
        loss = dice_ce(logits.float(), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()
        total += loss.item()
    return total / STEPS


def dice_ce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy and soft Dice of both foreground classes."""
    probabilities = logits.softmax(1)[:, 1:]
    truth = torch.stack([labels == 1, labels == 2], 1).float()
    overlap = (probabilities * truth).sum((2, 3, 4))
    total = probabilities.sum((2, 3, 4)) + truth.sum((2, 3, 4))
    dice = (2 * overlap + 1) / (total + 1)
    return 1 - dice.mean() + functional.cross_entropy(logits, labels)


def stamp() -> None:
    """Note that a round begins; the benchmark reads the time between rounds off the file."""
    with open(os.environ["OVERHEAD_STAMPS"], "a", encoding="ascii") as file:
        file.write(f"{time.time()}\n")
