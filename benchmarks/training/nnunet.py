"""nnU-Net v2's trainer and FedSeg's `fit` on nnU-Net's own network; runs in nnU-Net's venv.

    python nnunet.py SCRATCH STEPS REPEATS THREADS

Prints one JSON line: wall and processor seconds a step of each, interleaved (the processor time of
nnU-Net's augmenting workers isn't in it), and the number of parameters.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from unittest import mock

# torchvision's wheel doesn't load beside torch's CPU build; nnU-Net only imports it, through timm.
for name in ("", ".ops", ".ops.misc", ".models", ".models.feature_extraction", ".transforms"):
    sys.modules[f"torchvision{name}"] = mock.MagicMock()

# What FedSeg needs beyond nnU-Net's packages comes from FedSeg's own environment.
sys.path.append(os.environ["FEDSEG_SITE"])

SCRATCH = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(".")
for variable in ("raw", "preprocessed", "results"):
    os.environ[f"nnUNet_{variable}"] = str(SCRATCH / variable)

PATCH = [64, 64, 64]
NAME = "Dataset001_synthetic"


def write_dataset(cases: int) -> None:
    """Raw data as nnU-Net wants it."""
    import nibabel as nib
    import numpy as np
    from harness import synthetic_scan

    raw = SCRATCH / "raw" / NAME
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        hu, labels = synthetic_scan((256, 256, 128), number)
        for path, array in (("imagesTr/c{}_0000", hu), ("labelsTr/c{}", labels)):
            file = raw / (path.format(number) + ".nii.gz")
            nib.save(nib.Nifti1Image(array, np.eye(4)), file)
    about = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumor": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(about))


def plan() -> dict:
    """nnU-Net's own plan, with the topology that it plans for a patch of 64^3."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import (
        get_pool_and_conv_props,
    )
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    extract_fingerprints([1], num_processes=2)
    plan_experiments([1])
    preprocess([1], configurations=["3d_fullres"], num_processes=[2])
    file = SCRATCH / "preprocessed" / NAME / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    _, strides, kernels, _, _ = get_pool_and_conv_props(configuration["spacing"], PATCH, 4, 999999)
    arguments = configuration["architecture"]["arch_kwargs"]
    stages = len(strides)
    arguments.update(
        n_stages=stages,
        features_per_stage=[min(320, 32 * 2**level) for level in range(stages)],
        strides=strides,
        kernel_sizes=kernels,
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )
    configuration.update(patch_size=PATCH, batch_size=2)
    plans["continue_training"] = False
    return plans


def main() -> None:
    steps, repeats, threads = (int(word) for word in sys.argv[2:5])
    import copy

    import numpy as np
    import torch
    from harness import cached_scan
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from fedseg.data.patches import batches
    from fedseg.sections import TrainConfig
    from fedseg.segmentation.losses import dice_ce
    from fedseg.segmentation.training import fit, make_optimizer

    torch.set_num_threads(threads)
    cases = 4
    write_dataset(cases)
    plans = plan()
    about = json.loads((SCRATCH / "preprocessed" / NAME / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", "all", about, device=torch.device("cpu"))
    trainer.plot_network_architecture = lambda: None
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()

    network = copy.deepcopy(trainer.network).to(memory_format=torch.channels_last_3d)
    network.decoder.deep_supervision = False  # FedSeg's networks give one logits tensor
    config = TrainConfig(optimizer="sgd", learning_rate=0.01, momentum=0.99)
    optimizer = make_optimizer(network, config)
    scans = [cached_scan(SCRATCH / "cache" / str(n), (256, 256, 128), n) for n in range(cases)]

    def fedseg(count: int) -> None:
        drawn = batches(
            scans,
            steps=count,
            batch_size=2,
            patch_size=PATCH,
            foreground=0.33,
            augmentation="full",
            rng=np.random.default_rng(0),
        )
        fit(
            network,
            drawn,
            dice_ce,
            config,
            steps=count,
            round_number=1,
            rounds=10,
            optimizer=optimizer,
            on_step=lambda step, steps, loss: float(loss),
        )

    def nnunet(count: int) -> None:
        for _ in range(count):
            trainer.train_step(next(trainer.dataloader_train))

    seconds: dict[str, list[float]] = {"nnunet": [], "fedseg": []}
    work: dict[str, list[float]] = {"nnunet": [], "fedseg": []}
    for loop in (nnunet, fedseg):
        loop(1)
    for _ in range(repeats):
        for loop in (nnunet, fedseg):
            time.sleep(10)  # nnU-Net's workers fill their queue, then leave the cores alone
            began, used = time.perf_counter(), time.process_time()
            loop(steps)
            seconds[loop.__name__].append((time.perf_counter() - began) / steps)
            work[loop.__name__].append((time.process_time() - used) / steps)
    parameters = sum(p.numel() for p in network.parameters())
    print(json.dumps({"seconds": seconds, "work": work, "parameters": parameters}), flush=True)
    for worker in multiprocessing.active_children():  # nnU-Net's augmenters have no other end
        worker.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
