"""Draw patches from N cached cases, train a few steps, print resident MB; training.py runs it."""

import json
import sys
from pathlib import Path

import numpy as np
from harness import cached_scan

from fedseg.data.patches import batches
from fedseg.sections import TrainConfig
from fedseg.segmentation.losses import dice_ce
from fedseg.segmentation.training import fit


def resident() -> dict[str, float]:
    status = Path("/proc/self/status").read_text()
    return {
        key: int(status.partition(f"{key}:")[2].split()[0]) / 1024
        for key in ("VmHWM", "VmRSS", "RssFile")
    }


def main() -> None:
    from training_network import build

    folder, count, draws = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    shape = (256, 256, 128)
    cases = [cached_scan(folder / str(number), shape, number) for number in range(count)]

    def draw(steps: int):
        return batches(
            cases,
            steps=steps,
            batch_size=2,
            patch_size=(64, 64, 64),
            foreground=0.67,
            augmentation="full",
            rng=np.random.default_rng(0),
        )

    network, _ = build()
    config = TrainConfig()
    fit(network, draw(2), dice_ce, config, steps=2, round_number=1, rounds=1)
    for _ in draw(draws):
        pass
    fit(network, draw(2), dice_ce, config, steps=2, round_number=1, rounds=1)
    print(json.dumps(resident()))


if __name__ == "__main__":
    main()
