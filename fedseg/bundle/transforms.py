"""Transforms, inferer and loop of a bundle's inference.json; they call FedSeg's own functions."""

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from torch import nn

from fedseg.data.plan import Plan
from fedseg.data.preprocess import Modality, Placement, prepare, restore
from fedseg.data.volumes import Volume
from fedseg.segmentation.inference import predict_logits
from fedseg.segmentation.models import build_model
from fedseg.segmentation.postprocess import clean_labels

__all__ = ["Predictor", "PrepareScand", "RestoreMaskd", "WindowInferer", "network_of"]

_RAS = np.array([[0, 1], [1, 1], [2, 1]])


def network_of(plan: Mapping[str, Any]) -> nn.Module:
    """Build the network of inference.json's plan, where it isn't a MONAI class as it is."""
    return build_model(Plan(**plan))


class PrepareScand(MapTransform):  # type: ignore[misc]
    """Turn a loaded scan `[1, x, y, z]` (a MetaTensor) into network input.

    Resampled to the plan's spacing, cropped to the body, normalised to -2 to 2, in RAS axis order.
    What the way back needs is kept under `<key>_scan`.
    """

    def __init__(self, keys: str, plan: Mapping[str, Any], modality: Modality = "auto") -> None:
        """Take the plan of inference.json."""
        super().__init__(keys)
        self.plan, self.modality = Plan(**plan), modality

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Prepare each key."""
        result = dict(data)
        for key in self.key_iterator(data):
            image = data[key]
            path = Path(str(image.meta.get("filename_or_obj", "scan")))
            prepared = prepare(_volume(image, path), self.plan, modality=self.modality)
            result[key] = torch.from_numpy(prepared.image)[None]
            result[f"{key}_scan"] = {
                "placement": prepared.placement.to_json(),
                "affine": np.asarray(image.affine, np.float64),
                "meta": dict(image.meta),
            }
        return result


def _volume(image: MetaTensor, path: Path) -> Volume:
    stored = image[0].numpy().astype(np.float32)
    if not np.isfinite(stored).all():
        raise ValueError(f"{path}: voxels are NaN or Inf; export the scan again")
    affine = np.asarray(image.affine, np.float64)
    orientation = io_orientation(affine)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(
        array=np.ascontiguousarray(apply_orientation(stored, orientation)),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        stored=None,
        stored_shape=stored.shape,
        stored_affine=affine,
        path=path,
    )


class RestoreMaskd(MapTransform):  # type: ignore[misc]
    """Turn logits `[C, x, y, z]` into a mask uint8 `[1, x, y, z]` on the scan's own grid."""

    def __init__(
        self,
        keys: str,
        orig_keys: str = "image",
        *,
        largest_liver: bool = True,
        tumor_in_liver: bool = False,
    ) -> None:
        """Take the key of the logits, that of the scan they are of, and what to clean away."""
        super().__init__(keys)
        self.orig_keys = orig_keys
        self.largest_liver, self.tumor_in_liver = largest_liver, tumor_in_liver

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Restore each key."""
        result = dict(data)
        scan = data[f"{self.orig_keys}_scan"]
        for key in self.key_iterator(data):
            labels = restore(torch.as_tensor(data[key]), Placement.from_json(scan["placement"]))
            labels = clean_labels(
                labels, largest_liver=self.largest_liver, tumor_in_liver=self.tumor_in_liver
            )
            to_stored = ornt_transform(_RAS, io_orientation(scan["affine"]))
            mask = torch.from_numpy(np.ascontiguousarray(apply_orientation(labels, to_stored)))
            result[key] = MetaTensor(mask[None], meta=scan["meta"])
        return result


class WindowInferer(Inferer):  # type: ignore[misc]
    """Sliding windows as FedSeg lays them: `(image [1, 1, x, y, z], network) -> logits`."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        """Take the plan of inference.json."""
        super().__init__()
        self.plan = Plan(**plan)

    def __call__(
        self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Predict logits float32 `[1, C, x, y, z]` on the CPU."""
        device = next(network.parameters()).device
        image = inputs[0, 0].detach().cpu().numpy()
        return predict_logits(network, image, self.plan, device=device)[None]


class Predictor:
    """Predict every scan of a dataset, one at a time; stands where other bundles have ignite's."""

    def __init__(
        self,
        dataset: Iterable[Mapping[Hashable, Any]],
        network: nn.Module,
        inferer: WindowInferer,
        postprocessing: Any,
    ) -> None:
        """Take the parts of inference.json."""
        self.dataset, self.network = dataset, network
        self.inferer, self.postprocessing = inferer, postprocessing

    def run(self) -> None:
        """Predict and save."""
        for item in self.dataset:
            logits = self.inferer(item["image"][None], self.network)
            self.postprocessing({**item, "pred": logits[0]})
