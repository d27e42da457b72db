"""The JSON files of a bundle: inference.json, metadata.json and the schema it is checked by."""

import importlib.metadata
import json
from typing import Any

from fedseg import __version__
from fedseg.bundle.facts import Facts
from fedseg.data.plan import CLASSES, Plan

__all__ = ["REQUIREMENTS", "SCHEMA", "inference_config", "metadata_config", "network_config"]

REQUIREMENTS = ("torch", "monai", "numpy", "nibabel", "scipy", "fire", "jsonschema")
"""What runs a bundle; fire is `python -m monai.bundle`'s, jsonschema `verify_metadata`'s."""

_SCHEMA_URL = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)

_TENSOR: dict[str, Any] = {
    "type": "object",
    "required": [
        *("type", "format", "num_channels", "spatial_shape"),
        *("dtype", "value_range", "is_patch_data", "channel_def"),
    ],
    "properties": {
        "type": {"type": "string"},
        "format": {"type": "string"},
        "modality": {"type": "string"},
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
        "dtype": {"type": "string"},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
_TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": _TENSOR}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_STRINGS = (
    *("schema", "version", "monai_version", "pytorch_version", "numpy_version"),
    *("task", "description", "authors", "copyright"),
)

SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "MONAI bundle metadata, after MONAI's bundle specification",
    "type": "object",
    "required": [*_STRINGS, "required_packages_version", "network_data_format"],
    "properties": {
        **{name: {"type": "string", "minLength": 1} for name in _STRINGS},
        "changelog": _TEXTS,
        "required_packages_version": _TEXTS,
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": _TENSORS, "outputs": _TENSORS},
        },
    },
}
"""JSON schema by MONAI's written specification; `verify_metadata` would else download one."""


def network_config(plan: Plan) -> dict[str, Any]:
    """Build the network's entry in inference.json: MONAI's own class where that is all of it."""
    if plan.model == "unet":
        return {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": CLASSES,
            "channels": [plan.width * 2**level for level in range(plan.depth)],
            "strides": [2] * (plan.depth - 1),
            "num_res_units": 2,
            "norm": ["instance", {"affine": True}],
        }
    return {"_target_": "scripts.transforms.network_of", "plan": "@plan"}


def inference_config(plan: Plan, *, modality: str = "auto") -> dict[str, Any]:
    """Build inference.json: `dataset_dir` and `output_dir` as model-zoo bundles have them."""
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii') + "
        "glob.glob(@dataset_dir + '/*.nii.gz'))",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "modality": modality,
        "largest_liver": True,
        "tumor_in_liver": False,
        "plan": json.loads(plan.model_copy(update={"reasons": {}}).to_json()),
        "network_def": network_config(plan),
        "network": "$@network_def.to(@device).eval()",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader"},
                {
                    "_target_": "EnsureChannelFirstd",
                    "keys": "image",
                    "channel_dim": "no_channel",
                },
                {
                    "_target_": "scripts.transforms.PrepareScand",
                    "keys": "image",
                    "plan": "@plan",
                    "modality": "@modality",
                },
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': scan} for scan in @datalist]",
            "transform": "@preprocessing",
        },
        "inferer": {"_target_": "scripts.transforms.WindowInferer", "plan": "@plan"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "scripts.transforms.RestoreMaskd",
                    "keys": "pred",
                    "orig_keys": "image",
                    "largest_liver": "@largest_liver",
                    "tumor_in_liver": "@tumor_in_liver",
                },
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_ext": ".nii.gz",
                    "output_dtype": "$numpy.uint8",
                    "output_postfix": "seg",
                    "separate_folder": False,
                    "resample": False,
                },
            ],
        },
        "evaluator": {
            "_target_": "scripts.transforms.Predictor",
            "dataset": "@dataset",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "initialize": [
            "$@network.load_state_dict(torch.load(@bundle_root + '/models/model.pt', "
            "weights_only=True, map_location=@device))"
        ],
        "run": ["$@evaluator.run()"],
    }


def metadata_config(plan: Plan, facts: Facts) -> dict[str, Any]:
    """Build metadata.json."""
    packages = {name: importlib.metadata.version(name) for name in REQUIREMENTS[:5]}
    window = list(plan.inference_patch)
    region = {"0": "background", "1": "liver", "2": "tumor"}
    origin = f"run {facts.run}, round {facts.round}" if facts.run else "a model file"
    return {
        "schema": _SCHEMA_URL,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by fedseg {__version__} from {origin}"},
        "monai_version": packages["monai"],
        "pytorch_version": packages["torch"].partition("+")[0],
        "numpy_version": packages["numpy"],
        "required_packages_version": {name: packages[name] for name in ("nibabel", "scipy")},
        "name": facts.name,
        "task": "Liver and liver-tumour segmentation",
        "description": "Federated segmentation of the liver and its tumours in CT or MR (FedSeg)",
        "authors": facts.authors,
        "copyright": f"Weights: {facts.license}. Code: MIT",
        "data_type": "nifti",
        "data_source": facts.data,
        "image_classes": "single channel, normalised to -2 to 2",
        "label_classes": "0 background, 1 liver, 2 tumor",
        "pred_classes": "3 channels of logits: background, liver, tumor",
        "eval_metrics": facts.scores,
        "intended_use": "Research only; no medical device, not for diagnosis or treatment",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "CT, MR",
                    "num_channels": 1,
                    "spatial_shape": window,
                    "dtype": "float32",
                    "value_range": [-2, 2],
                    "is_patch_data": True,
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "classes",
                    "num_channels": CLASSES,
                    "spatial_shape": window,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": region,
                }
            },
        },
    }
