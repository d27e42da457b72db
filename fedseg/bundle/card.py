"""The model card, docs/README.md of a bundle, and its LICENSE."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import fedseg
from fedseg.bundle.configs import REQUIREMENTS
from fedseg.bundle.facts import UNTOLD, Facts
from fedseg.data.plan import Plan

__all__ = ["license_text", "model_card"]

_CARD = """# {name}

{warning}Segments the liver (label 1) and its tumours (label 2) in CT or MR of the abdomen. Trained
by federated learning with FedSeg {version}: only model updates left the sites.

## Run it

It needs no FedSeg: `pip install {requirements}`, then in this folder

```bash
python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS --output_dir OUT
```

`SCANS` holds `.nii` or `.nii.gz` files; `OUT` gets `<name>_seg.nii.gz`, on the scan's own grid,
with 0 background, 1 liver, 2 tumor. For MR that has values under -200 add `--modality mr`; only
the largest piece of liver is kept unless you add `--largest_liver False`. This checks the metadata,
without network:

```bash
python -m monai.bundle verify_metadata --meta_file configs/metadata.json \\
  --filepath configs/meta_schema.json
```

What happens to a scan is in `configs/inference.json` and `scripts/`: RAS axis order,
{spacing} mm (antialiased), crop to the body, CT window {low:g} to {high:g} HU (MR: its percentiles
{mr_low:g} and {mr_high:g}) to -2 and 2, windows of {patch} voxels, logits back on the scan's grid.

{files}

## Intended use and limits

Research only. It is no medical device and must not be used for diagnosis or treatment. It knows
scans like those it was trained on; on other scanners, contrast phases, ages or diseases it can fail
without a sign: miss tumours, or call healthy tissue tumour. Every mask needs the eyes of someone
who reads such scans.

## Data

{data}.

## Metrics

{metrics}

## Privacy

{privacy}.

## Licence

Weights: {license}. Code in `scripts/`: MIT, see `LICENSE`.

## Origin

{origin}
"""

_PHANTOMS = """**Trained on phantoms (synthetic CT) alone: no clinical value, for no patient.**

"""

_FILES = {
    "models/model.pt": "state dict; `torch.load(..., weights_only=True)`",
    "models/model.ts": "TorchScript of the network",
    "models/model.onnx": "ONNX of the network: `image` `[B, 1, x, y, z]`, `pred` `[B, 3, x, y, z]`",
}


def model_card(plan: Plan, facts: Facts, hashes: Mapping[str, str]) -> str:
    """Write the card.

    Args:
        plan: The model's plan.
        facts: What is known of its run.
        hashes: File in the bundle (or what it came from) to SHA-256.
    """
    rows = ["| file | content | SHA-256 |", "|---|---|---|"]
    rows += [f"| `{f}` | {_FILES.get(f, 'the model file')} | `{h}` |" for f, h in hashes.items()]
    origin = {"run": facts.run, "round": facts.round, **facts.versions}
    return _CARD.format(
        name=facts.name,
        warning=_PHANTOMS if facts.phantoms else "",
        version=fedseg.__version__,
        requirements=" ".join(REQUIREMENTS),
        spacing=" x ".join(f"{mm:g}" for mm in plan.spacing),
        low=plan.ct_window[0],
        high=plan.ct_window[1],
        mr_low=plan.mr_percentiles[0],
        mr_high=plan.mr_percentiles[1],
        patch=" x ".join(map(str, plan.inference_patch)),
        files="\n".join(rows),
        data=facts.data,
        metrics=_metrics(facts),
        privacy=facts.privacy,
        license=facts.license,
        origin="\n".join(f"- {key}: {value}" for key, value in origin.items() if value)
        or "- not told",
    )


def _metrics(facts: Facts) -> str:
    if not facts.rows:
        return f"{UNTOLD}."
    head = ("scored on", "region", "metric", "mean", "95% interval", "cases")
    rows = [head, ("---",) * len(head), *facts.rows]
    return (
        "The mean over the cases that define the metric; of a run, in the round of these weights.\n"
        "Region `liver` is the liver with its tumours. Distances are in mm.\n\n"
    ) + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def license_text(facts: Facts) -> str:
    """Write LICENSE: what holds for the weights, and FedSeg's own licence for the code."""
    found = importlib.metadata.distribution("fedseg").read_text("licenses/LICENSE")
    beside = Path(fedseg.__file__).parents[1] / "LICENSE"
    code = found or (beside.read_text(encoding="utf-8") if beside.is_file() else "MIT License\n")
    return f"The weights in models/: {facts.license}\n\nThe code in scripts/:\n\n{code}"
