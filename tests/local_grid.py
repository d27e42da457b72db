"""Flower in one process: a grid whose messages go to the ClientApp next door."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid

from fedseg import client_app

SMALL: dict[str, Any] = {
    "model.width": 4,
    "model.depth": 3,
    "train.patch-size": "16,16,16",
    "train.steps-per-epoch": 2,
    "train.precision": "fp32",
    "train.learning-rate": 1e-3,
    "federation.rounds": 2,
    "federation.personal": False,
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
        typed: Keys of the run config that the user gave; the others are the app's defaults.
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
        typed: Mapping[str, Any] | None = None,
    ) -> None:
        self.node_configs, self.run_config = dict(node_configs), run_config
        self.names, self.around, self.reply = names or {}, around or {}, reply or {}
        self.last_first = last_first
        self._run = SimpleNamespace(override_config=dict(typed or {}))
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._pending: dict[str, Message] = {}
        self._ids = (f"message-{n}" for n in itertools.count())
        self._contexts: dict[int, Context] = {}
        for node, config in node_configs.items():
            self.add_node(node, config)

    def add_node(self, node: int, config: dict[str, Any]) -> None:
        """Let another node register."""
        self.node_configs[node] = config
        self._contexts[node] = Context(0, node, dict(config), RecordDict(), dict(self.run_config))

    def set_run(self, run: Any) -> None:
        """Not needed here."""

    @property
    def run(self) -> Any:
        return self._run

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
        self.received.append(_twin(answer))
        return [answer]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: Any = None) -> Any:
        raise AssertionError("send_and_receive holds all replies at once")


def _twin(message: Message) -> Message:
    """Copy a message: whoever takes a round's updates empties them."""
    twin = copy.copy(message)
    if message.has_content():
        twin.__dict__["_content"] = RecordDict(
            {
                name: ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else record
                for name, record in message.content.items()
            }
        )
    return twin


def sent_weights(message: Message, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in a message to a site: one vector, tensors by name."""
    (array,) = message.content.array_records["arrays"].values()
    sizes = [like[name].numel() for name in sorted(like)]
    parts = torch.from_numpy(array.numpy().copy()).split(sizes)
    return {n: p.reshape(like[n].shape) for n, p in zip(sorted(like), parts, strict=True)}
