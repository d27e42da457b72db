"""Shared fixtures: one thread, own folders, tiny sites, and Flower in one process."""

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import nibabel as nib
import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedseg import client_app, server_app
from fedseg.federation.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """The apps add a handler for this test's captured stderr; it must not outlive the test."""
    yield
    logger = logging.getLogger("fedseg")
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches and runs of a test stay in a folder of its own."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FEDSEG_HOME", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def write_case(folder: Path, name: str, seed: int, *, shape: tuple[int, int, int]) -> None:
    """Write a cheap CT-like case: a body, a bright liver box, a dark tumour in it."""
    rng = np.random.default_rng(seed)
    image = np.full(shape, -1000.0)
    image[1:-1, 1:-1, 1:-1] = 0
    labels = np.zeros(shape, np.uint8)
    low = [n // 4 + int(rng.integers(2)) for n in shape]
    high = [3 * n // 4 for n in shape]
    labels[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    labels[low[0] + 2 : low[0] + 5, low[1] + 2 : low[1] + 5, low[2] + 2 : low[2] + 5] = 2
    image[labels == 1], image[labels == 2] = 120, 60
    image += rng.normal(0, 10, shape)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    for part, array in (("images", image.astype(np.int16)), ("masks", labels)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), folder / part / f"{name}.nii.gz")


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Path]:
    """Write a site's folder: `make_site("aachen", cases=3)`."""

    def make(
        name: str, *, cases: int = 3, seed: int = 0, shape: tuple[int, int, int] = (20, 18, 16)
    ) -> Path:
        folder = tmp_path / name
        for case in range(cases):
            write_case(folder, f"case-{case}", 100 * seed + case, shape=shape)
        (folder / "site.toml").write_text(f'name = "{folder.name}"\n')
        return folder

    return make


SMALL: dict[str, Any] = {
    "model.width": 4,
    "model.depth": 3,
    "train.patch-size": "16,16,16",
    "train.steps-per-epoch": 2,
    "train.precision": "fp32",
    "train.learning-rate": 1e-3,
    "federation.rounds": 2,
    "federation.connect-deadline": 5.0,
    "data.server-cases": 0,
}

ClientHook = Callable[[Message], contextlib.AbstractContextManager[None]]
ReplyHook = Callable[[Message], Message | None]


class LocalGrid(Grid):
    """Flower in one process: each message is packed and unpacked as on the wire.

    Args:
        node_configs: Node id to its node-config.
        run_config: The study's run config.
        names: Node id to registered name.
        around: Node id to a context in which its ClientApp runs.
        reply: Node id to a function that changes or drops its reply.
        last_first: Hand out replies in the opposite order.
    """

    def __init__(
        self,
        node_configs: dict[int, dict[str, Any]],
        run_config: dict[str, Any],
        *,
        names: dict[int, str] | None = None,
        around: dict[int, ClientHook] | None = None,
        reply: dict[int, ReplyHook] | None = None,
        last_first: bool = False,
    ) -> None:
        self.node_configs, self.run_config = node_configs, run_config
        self.names, self.around, self.reply = names or {}, around or {}, reply or {}
        self.last_first = last_first
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._pending: dict[str, Message] = {}
        self._ids = (f"message-{n}" for n in itertools.count())
        self._contexts = {
            node: Context(0, node, dict(config), RecordDict(), dict(run_config))
            for node, config in node_configs.items()
        }

    def set_run(self, run: Any) -> None:
        """Not needed here."""

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.node_configs)

    def get_nodes(self) -> Iterable[Any]:
        return [
            SimpleNamespace(node_id=node, name=self.names.get(node, ""))
            for node in self.node_configs
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            copy = message_from_proto(message_to_proto(message))
            copy.metadata.__dict__["_message_id"] = next(self._ids)
            self._pending[copy.metadata.message_id] = copy
            self.sent.append(copy)
            ids.append(copy.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        waiting = list(self._pending)
        if self.last_first and waiting and message_id != waiting[-1]:
            return []
        message = self._pending.pop(message_id, None)
        if message is None:
            return []
        node = message.metadata.dst_node_id
        with self.around.get(node, lambda _: contextlib.nullcontext())(message):
            answer: Message | None = client_app.app(message, self._contexts[node])
        assert answer is not None
        answer = message_from_proto(message_to_proto(answer))
        if node in self.reply:
            answer = self.reply[node](answer)
        if answer is None:
            return []
        self.received.append(answer)
        return [answer]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: Any = None) -> Any:
        raise AssertionError("send_and_receive holds all replies at once")


@pytest.fixture
def run_study(tmp_path: Path) -> Iterator[Callable[..., tuple[RunFolder, LocalGrid]]]:
    """Run a whole study in this process."""
    identity = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    runs = itertools.count()

    def run(
        node_configs: dict[int, dict[str, Any]], config: dict[str, Any] | None = None, **hooks: Any
    ) -> tuple[RunFolder, LocalGrid]:
        output = {"output.dir": str(tmp_path / "runs" / str(next(runs)))}
        run_config = {**SMALL, **output, **(config or {})}
        client_app._built.cache_clear()
        grid = LocalGrid(node_configs, run_config, **hooks)
        run.grid = grid  # type: ignore[attr-defined]
        context = Context(7, 1, {}, RecordDict(), run_config)
        return server_app.run_study(grid, context), grid

    yield run
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = identity
