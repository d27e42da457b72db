"""Seconds from torch's own import to a site's first training step; training.py runs it."""

import json
import sys
import time
from pathlib import Path

import torch

began = time.perf_counter()


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))

    import numpy as np

    from fedseg import client_app, site_work  # noqa: F401  what a site's process imports

    imported = time.perf_counter()
    from harness import cached_scan
    from training_network import build

    from fedseg.data.patches import batches
    from fedseg.sections import TrainConfig
    from fedseg.segmentation.losses import dice_ce
    from fedseg.segmentation.training import fit

    network, plan = build()
    folder = Path(sys.argv[1])
    cases = [cached_scan(folder / str(n), (256, 256, 128), n) for n in range(2)]
    built = time.perf_counter()
    drawn = batches(
        cases,
        steps=1,
        batch_size=2,
        patch_size=plan.patch_size,
        foreground=0.67,
        augmentation="light",
        rng=np.random.default_rng(0),
    )
    fit(network, drawn, dice_ce, TrainConfig(), steps=1, round_number=1, rounds=1)
    done = time.perf_counter()
    print(
        json.dumps(
            {"imports": imported - began, "network": built - imported, "first step": done - built}
        )
    )


if __name__ == "__main__":
    main()
