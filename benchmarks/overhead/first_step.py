"""Seconds from a train message to the end of the site's first step, in a new and a warm process.

    python benchmarks/overhead/first_step.py

In a deployment each message is a new process. This runs the server in-process up to its first train
message, then gives that message to new processes; torch's own import, which nobody can avoid, is
timed apart. The second message in the same process stands for a simulated site's warm worker.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROCESSES = 5
CONFIG = {
    "model.depth": 5,
    "train.patch-size": "64,64,64",
    "train.batch-size": 2,
    "train.spacing": "2.5,2.5,3",
    "train.ct-window": "-150,250",
    "train.steps-per-epoch": 1,
    "federation.min-sites": 1,
    "data.server-cases": 0,
}


def record(folder: Path) -> None:
    """Start a study with one site and keep its first train message."""
    from flwr.app import Context, Message, RecordDict
    from flwr.common.serde import message_to_proto
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from fedseg import client_app, server_app
    from fedseg.data.phantom import KINDS, write_phantom_site

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    write_phantom_site(folder / "site", KINDS["portal"], range(4), name="site")
    config: dict[str, Any] = {**CONFIG, "output.dir": str(folder / "runs")}
    context = Context(1, 1, {"data-dir": str(folder / "site")}, RecordDict(), config)

    class Recorded(Exception):
        """The message is on disk."""

    class OneSite(Grid):
        """Answers hello, keeps the train message and ends the run there."""

        run, set_run, create_message, send_and_receive = None, None, None, None

        def __init__(self) -> None:
            self.answers: dict[str, Message] = {}

        def get_node_ids(self) -> Iterable[int]:
            return [1]

        def get_nodes(self) -> Iterable[Any]:
            return [SimpleNamespace(node_id=1, name="")]

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.metadata.message_type
                if message.metadata.message_type == "train":
                    packed = message_to_proto(message).SerializeToString()
                    (folder / "message").write_bytes(packed)
                    raise Recorded
                self.answers[message.metadata.message_id] = client_app.app(message, context)
                yield message.metadata.message_id

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [self.answers[message_id] for message_id in message_ids]

    try:
        server_app.run_study(OneSite(), context)
    except Recorded:
        (folder / "config.json").write_text(json.dumps(config))
    # Once, so that the cases are preprocessed and the modules compiled.
    play(folder)


def play(folder: Path) -> dict[str, float]:
    """Give the message to the ClientApp twice; return what each part took."""
    times = [time.perf_counter()]
    import torch  # noqa: F401

    times.append(time.perf_counter())
    from flwr.app import Context, RecordDict
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as Packed
    from flwr.supercore.task_identity import TaskIdentity

    from fedseg import client_app, site_work  # noqa: F401  a message to train imports the latter

    times.append(time.perf_counter())
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    class FirstStep(logging.Handler):
        """The site logs its steps."""

        def emit(self, record: logging.LogRecord) -> None:
            if "step" in record.msg:
                times.append(time.perf_counter())

    logger = logging.getLogger("fedseg")
    logger.addHandler(FirstStep())
    logger.propagate = False
    config = json.loads((folder / "config.json").read_text())
    context = Context(1, 1, {"data-dir": str(folder / "site")}, RecordDict(), config)
    for _ in range(2):
        message = message_from_proto(Packed.FromString((folder / "message").read_bytes()))
        times.append(time.perf_counter())
        client_app.app(message, context)
    _, torch_in, fedseg_in, _, cold, second, warm = times
    return {
        "torch's import": torch_in - times[0],
        "fedseg's import": fedseg_in - torch_in,
        "new process, to the first step": cold - torch_in,
        "warm process, to the first step": warm - second,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "FEDSEG_HOME": f"{scratch}/home", "OMP_WAIT_POLICY": "PASSIVE"}

        def run(mode: str) -> str:
            command = [sys.executable, __file__, mode, scratch]
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            return done.stdout

        run("record")
        found = [json.loads(run("play")) for _ in range(PROCESSES)]
    for name in found[0]:
        values = [one[name] for one in found]
        middle = statistics.median(values)
        print(f"{name}: {middle:.2f} s ({min(values):.2f}-{max(values):.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        record(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["play"]:
        print(json.dumps(play(Path(sys.argv[2]))))
    else:
        main()
