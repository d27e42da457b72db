"""Transforms of a bundle, run where FedSeg is: there they use its own types."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt
from small_model import plan_of

from fedseg.bundle.configs import inference_config
from fedseg.bundle.transforms import PrepareScand, RestoreMaskd
from fedseg.commands.predict import predict

PLAN = {**plan_of().model_dump(mode="json"), "reasons": {}}


def scan(axes: str = "RAS") -> MetaTensor:
    """A body of 24 x 20 x 16 voxels of 4 x 4 x 5 mm, with two livers, in any axis order."""
    hu = np.full((24, 20, 16), -1000.0, np.float32)
    hu[1:-1, 1:-1, 1:-1] = 0
    hu[3:12, 4:12, 4:12] = 100
    hu[16:20, 4:8, 4:8] = 100
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    order = axcodes2ornt(tuple(axes)).astype(int)
    stored = np.transpose(hu, order[:, 0])
    for axis, (world, sign) in enumerate(order):
        size = (4.0, 4.0, 5.0)[world]
        affine[world, axis] = sign * size
        if sign < 0:
            stored = np.flip(stored, axis)
            affine[world, 3] = size * (hu.shape[world] - 1)
    return MetaTensor(np.ascontiguousarray(stored)[None], affine=affine)


def masked(image: MetaTensor, **options: Any) -> tuple[np.ndarray, MetaTensor]:
    """Prepare a scan, call what is brighter than 50 HU liver, restore."""
    data = PrepareScand("image", PLAN)({"image": image})
    low, high = PLAN["ct_window"]
    liver = data["image"][0] > (50 - (low + high) / 2) / ((high - low) / 4)
    logits = torch.stack([~liver, liver, torch.zeros_like(liver)]).float()
    mask = RestoreMaskd("pred", **options)({**data, "pred": logits})["pred"]
    return np.asarray(mask[0]), mask


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
def test_mask_lies_where_the_scan_is_bright_in_any_axis_order(axes: str) -> None:
    image = scan(axes)
    labels, mask = masked(image, largest_liver=False)
    assert mask.shape == image.shape and labels.dtype == np.uint8
    assert np.array_equal(np.asarray(mask.affine), np.asarray(image.affine))
    assert np.array_equal(labels == 1, np.asarray(image[0]) > 50)


def test_only_the_largest_liver_is_kept_unless_told() -> None:
    image = scan()
    both, _ = masked(image, largest_liver=False)
    one, _ = masked(image)
    assert both.sum() == 9 * 8 * 8 + 4 * 4 * 4
    assert one.sum() == 9 * 8 * 8


def test_voxels_that_are_no_numbers_are_refused() -> None:
    image = scan()
    image[0, 3, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        PrepareScand("image", PLAN)({"image": image})


def test_cleaning_is_that_of_fedseg_predict() -> None:
    config = inference_config(plan_of())
    for name, option in inspect.signature(predict).parameters.items():
        if name in ("largest_liver", "tumor_in_liver"):
            assert config[name] is option.default
