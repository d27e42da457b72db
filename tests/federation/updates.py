"""What tests of the reduction share: updates in a spool, and the same as replies for Flower."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedseg.arrays import state_to_arrays
from fedseg.config import StudyConfig
from fedseg.federation.compression import encode, make_scheme
from fedseg.federation.flat import Layout, unflatten
from fedseg.federation.spool import SpooledUpdate, open_update, spool
from fedseg.federation.strategies import train_config

State = dict[str, torch.Tensor]


@contextmanager
def identity() -> Iterator[None]:
    """Flower's messages want to know who they are."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def study(**federation: Any) -> StudyConfig:
    """`study(malicious_sites=2)` for `federation.malicious-sites = 2`."""
    keys = {f"federation.{key.replace('_', '-')}": value for key, value in federation.items()}
    return StudyConfig.from_run_config(keys)


def spooled(
    folder: Path, vectors: Sequence[np.ndarray] | Mapping[str, np.ndarray], *, scheme: str = "none"
) -> list[SpooledUpdate]:
    """Spool flat vectors; sites are named in the order given unless they have names."""
    if not isinstance(vectors, Mapping):
        vectors = {f"site-{n:03d}": vector for n, vector in enumerate(vectors)}
    found = []
    for site, vector in vectors.items():
        values = torch.from_numpy(np.ascontiguousarray(vector, np.float32))
        how = make_scheme(scheme)
        path = spool(folder, site, encode(values, how), scheme=how)
        found.append(open_update(path, size=len(values)))
    return sorted(found, key=lambda update: update.site)


def template() -> Message:
    """A message to reply to."""
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "m"
    return message


def by_flower(
    strategy: Strategy,
    before: State,
    updates: Sequence[np.ndarray],
    metrics: Sequence[Mapping[str, float]],
    layout: Layout,
) -> np.ndarray:
    """Flower's own aggregate of the sites' replies, less the global weights: the flat change."""
    train_config(strategy, 1, before, ConfigRecord(), list(range(1, len(updates) + 1)))
    replies = []
    for vector, numbers in zip(updates, metrics, strict=True):
        change = unflatten(torch.from_numpy(vector), layout)
        arrays = state_to_arrays({name: before[name] + change[name] for name in before})
        record = MetricRecord(dict(numbers))
        replies.append(Message(RecordDict({"arrays": arrays, "m": record}), reply_to=template()))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    moved = {name: array.numpy().astype(np.float64) for name, array in arrays.items()}
    return np.concatenate(
        [(moved[name] - before[name].double().numpy()).ravel() for name in layout.shapes]
    )
