"""Scores of a network on the server's own cases."""

import copy

from torch import nn

from fedseg.config import StudyConfig
from fedseg.data.held_out import HeldOut, server_cases
from fedseg.data.plan import Plan
from fedseg.federation.federation import ServerEvaluation, Summary
from fedseg.segmentation.evaluation import evaluate_cases
from fedseg.segmentation.metrics import summarise
from fedseg.segmentation.training import choose_device

__all__ = ["server_evaluation"]


def server_evaluation(study: StudyConfig, plan: Plan, *, simulated: bool) -> ServerEvaluation:
    """Make the function that scores a network on the server's own cases."""
    groups = server_cases(study, plan, simulated=simulated)
    device = choose_device("auto")

    def score(network: nn.Module, held: HeldOut, distances: bool) -> Summary:
        sums = evaluate_cases(
            network,
            held.cases,
            plan,
            device=device,
            precision=study.train.precision,
            annotated=held.annotated,
            distances=distances,
        )
        return summarise(sums)

    def evaluate(network: nn.Module, *, distances: bool = False) -> dict[str, Summary]:
        if device.type != "cpu" and groups:
            # Scoring brings a network to its device, and the global model is averaged on the CPU.
            network = copy.deepcopy(network)
        return {name: score(network, held, distances) for name, held in groups.items()}

    return evaluate
