"""Flower's FedAvg that notes when a round begins: for the minimal app and for FedSeg alike."""

import os
import time
from typing import Any

from flwr.serverapp.strategy import FedAvg


class TimedFedAvg(FedAvg):
    """FedAvg, with a line in `OVERHEAD_STAMPS` a round."""

    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        with open(os.environ["OVERHEAD_STAMPS"], "a", encoding="ascii") as file:
            file.write(f"{time.time()}\n")
        return super().configure_train(*args, **kwargs)


def fedavg(study: object) -> TimedFedAvg:
    """For FedSeg's `federation.strategy = "timed:fedavg"`."""
    return TimedFedAvg()
