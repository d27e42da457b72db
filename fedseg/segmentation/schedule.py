"""The learning rate over a run's rounds."""

import math
import time

from fedseg.sections import TrainConfig

__all__ = ["RoundClock", "learning_rate"]


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate at `progress` of the whole run, 0 to 1.

    Poly is nnU-Net's, exponent 0.9.
    """
    if progress < config.warmup:
        return config.learning_rate * (0.1 + 0.9 * progress / config.warmup)
    left = 1 - (progress - config.warmup) / (1 - config.warmup)
    factor: float = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
        "poly": max(left, 0.0) ** 0.9,
    }[config.schedule]
    return config.learning_rate * max(factor, 0.01)


class RoundClock:
    """How much of a round is done: of its time with `train.minutes`, else of its steps."""

    def __init__(self, config: TrainConfig, *, steps: int, number: int, rounds: int) -> None:
        """Begin a round.

        Args:
            config: The study's training.
            steps: Steps of the round.
            number: The round, from 1.
            rounds: Rounds of the run.
        """
        self.config, self.steps, self.number, self.rounds = config, steps, number, rounds
        self.began = time.monotonic()

    def rate(self, done: int) -> float:
        """Learning rate after so many steps of the round."""
        share = done / self.steps
        if self.config.minutes:
            share = min(1.0, (time.monotonic() - self.began) / (60 * self.config.minutes))
        return learning_rate(self.config, (self.number - 1 + share) / self.rounds)
