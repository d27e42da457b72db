"""What a malicious or broken site sends: functions from an honest update to another."""

from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message

__all__ = ["ATTACKS", "attacker"]

Update = Mapping[str, np.ndarray]
Attack = Callable[[Update, np.random.Generator], dict[str, np.ndarray]]


def nan(update: Update, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One NaN in each array is enough to spoil a mean."""
    spoilt = {name: array.copy() for name, array in update.items()}
    for array in spoilt.values():
        array.flat[0] = np.nan
    return spoilt


def zeros(update: Update, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Nothing: a site that wants the model without working for it."""
    return {name: np.zeros_like(array) for name, array in update.items()}


def noise(update: Update, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """White noise of the honest update's norm."""
    drawn = {name: rng.standard_normal(array.shape) for name, array in update.items()}
    scale = norm(update) / norm(drawn)
    return {name: (scale * drawn[name]).astype(update[name].dtype) for name in update}


def sign_flip(update: Update, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The opposite of what the site learnt."""
    return {name: -array for name, array in update.items()}


def sign_flip_enlarged(update: Update, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Its opposite four times: of five sites one then holds up the other four.

    A plain sign flip leaves three fifths of what the five would move.
    """
    return {name: -4 * array for name, array in update.items()}


def huge(update: Update, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A hundred times the honest update."""
    return {name: 100 * array for name, array in update.items()}


ATTACKS: dict[str, Attack] = {
    "NaN": nan,
    "zeros": zeros,
    "noise": noise,
    "sign-flip": sign_flip,
    "sign-flip x4": sign_flip_enlarged,
    "100x": huge,
}


def norm(update: Update) -> float:
    """Euclidean norm over all arrays."""
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in update.values())))


def attacker(name: str, *, seed: int = 0) -> Callable[[Message], Message]:
    """Make a `reply` hook of `LocalGrid`: the site works as it should, then sends this instead."""
    rng = np.random.default_rng(seed)

    def reply(message: Message) -> Message:
        record = message.content.array_records.get("update")
        if record is not None:
            honest = {key: array.numpy() for key, array in record.items()}
            sent = ATTACKS[name](honest, rng)
            message.content["update"] = ArrayRecord({k: Array(v) for k, v in sent.items()})
        return message

    return reply
