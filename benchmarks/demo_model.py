"""Make the demo model that ships in `fedseg_weights`: a federated run on phantoms, as float16.

    python benchmarks/demo_model.py              # the run, 15 rounds
    python benchmarks/demo_model.py --run RUN    # from a run folder that is there

Writes `fedseg_weights/demo.safetensors` and its model card `demo.md`. The card's numbers are those
of the written file, on phantoms that no site has.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from harness import ROOT, run

from fedseg.config import StudyConfig
from fedseg.data.held_out import server_cases
from fedseg.data.plan import Plan
from fedseg.segmentation.evaluation import evaluate_cases
from fedseg.segmentation.metrics import summarise
from fedseg.segmentation.model_file import load_model, read_model_file, save_model, sha256_of
from fedseg.segmentation.models import parameter_count

OPTIONS = "model.width=8 federation.rounds=15 data.server-cases=4"
FOLDER = ROOT / "fedseg_weights"


def shrink(best: Path, out: Path) -> None:
    """Write a run's best model as float16."""
    state, plan, notes = read_model_file(best)
    halves = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    save_model(out, halves, plan, run=notes["run"], round=notes["round"], data="phantoms")


def scores(file: Path, study: StudyConfig) -> dict[str, dict]:
    """Score a model file on the held-out phantoms of a study."""
    network, plan = load_model(file)
    groups = server_cases(study, plan, simulated=True)
    cpu = torch.device("cpu")
    return {
        name: summarise(evaluate_cases(network, held.cases, plan, device=cpu))
        for name, held in groups.items()
    }


def card(file: Path, study: StudyConfig, plan: Plan, found: dict[str, dict]) -> str:
    """The model card."""
    titles = {"global": "the sites' kinds of phantom", "unseen": "a kind that no site has"}
    network, _ = load_model(file)
    _, _, notes = read_model_file(file)
    sites, cases = 3, study.data.phantom_cases
    lines = [
        "# Model card: demo",
        "",
        "**Trained on phantoms (synthetic CT) alone: no clinical value, for no patient.** It is",
        "there to try `fedseg predict --model demo`, `fedseg export demo` and a pretrained start",
        '(`model.init-from = "demo"`, off unless a study sets it).',
        "",
        f"- Network: {plan.model} of MONAI, channels "
        f"{', '.join(str(plan.width * 2**level) for level in range(plan.depth))}, "
        f"{parameter_count(network):,} parameters, stored as float16 "
        f"({file.stat().st_size / 1e6:.1f} MB).",
        f"- Training: federated averaging over {sites} simulated sites with {cases} phantoms each "
        f"({study.data.phantom_kinds.replace(',', ', ')}),",
        f"  {study.federation.rounds} rounds, seed {study.train.seed}; the weights are those of "
        f"round {notes['round']} of run `{notes['run']}`.",
        f"- Input: {' x '.join(f'{mm:g}' for mm in plan.spacing)} mm; CT window "
        f"{plan.ct_window[0]:g} to {plan.ct_window[1]:g} HU. Output: background, liver, tumor.",
        "- Privacy: phantoms are nobody's; nothing was spent.",
        "- Licence: MIT, as FedSeg.",
        f"- SHA-256: `{sha256_of(file)}`",
        "- Made by `python benchmarks/demo_model.py`.",
        "",
        "Dice of this file on held-out phantoms, mean over cases (pooled over voxels):",
        "",
        "| held-out phantoms | liver | tumor |",
        "|---|---|---|",
    ]
    for name, summary in found.items():
        cells = [
            f"{summary[f'{region}.dice']:.3f} ({summary[f'{region}.dice.pooled']:.3f})"
            for region in ("liver", "tumor")
        ]
        lines.append(f"| {titles[name]} ({summary['cases']}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, shrink, score, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run's folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["FEDSEG_HOME"] = str(scratch / "fedseg")
        if arguments.run is None:
            run(OPTIONS, scratch)
        source = arguments.run or scratch / "runs" / "latest"
        study = StudyConfig.from_json((source / "config.json").read_text())
        file = FOLDER / "demo.safetensors"
        shrink(source / "model-best.safetensors", file)
        _, plan, _ = read_model_file(file)
        text = card(file, study, plan, scores(file, study))
    (FOLDER / "demo.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
