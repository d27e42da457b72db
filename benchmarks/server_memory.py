"""Does a ServerApp's memory grow with the number of sites? Whole rounds, seen from outside.

    python benchmarks/server_memory.py               # 2 and 64 sites, 10 million parameters
    python benchmarks/server_memory.py --quick       # 2 and 5 sites, a small network: does it run?

A process runs the real ServerApp for two rounds: plan, hello, train, guard, reduce, checkpoint,
evaluate. Its grid makes each site's reply only when the server pulls it, as one that comes over
the network does; the replies are random updates, so no site's training is in the figures. The
SuperLink, which keeps what sites have sent until it is pulled, is another process and not counted:
see `superlink_memory.py`. Writes `benchmarks/results/<date>-server-memory.md`.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import sys
import tempfile
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from harness import processor, watched, write_result

from fedseg import server_app
from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan
from fedseg.federation.compression import Scheme, encode, scheme_of
from fedseg.greeting import Greeting, greeting_message
from fedseg.messages import ARRAYS, TRAIN_METRICS, answer_message
from fedseg.segmentation.metrics import empty_sums
from fedseg.segmentation.models import build_model, parameter_count

SITES, PARAMETERS = (2, 64), 10_000_000
LEAST = {"fedmedian": 3, "fedtrimmedavg": 5, "krum": 5, "multikrum": 5, "bulyan": 7}
STRATEGIES = (
    *("fedavg", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg"),
    *("fedadam", "fednova"),
)


class Distant(Grid):
    """Sites that answer when they are asked for their answer."""

    def __init__(self, sites: int, scheme: Scheme) -> None:
        self.sites, self.scheme = sites, scheme
        self.asked: dict[str, Message] = {}
        self.length = 0
        self.count = itertools.count()

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.sites + 1)

    def get_nodes(self) -> Iterable[Any]:
        return [SimpleNamespace(node_id=n, name="") for n in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            metadata = message.metadata
            if metadata.message_type == "train":
                self.length = model_length(message)
            to = Message(
                RecordDict(),
                dst_node_id=metadata.dst_node_id,
                message_type=metadata.message_type,
            )
            to.metadata.__dict__["_message_id"] = f"message-{next(self.count)}"
            self.asked[to.metadata.message_id] = to
            ids.append(to.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        to = self.asked.pop(message_id)
        node = to.metadata.dst_node_id
        greeting = Greeting(name=f"site-{node - 1}", simulated=True, sites=self.sites)
        return [answer(to, greeting, node, self.length, self.scheme)]


def model_length(message: Message) -> int:
    """Number of the shared floats in a message to train."""
    (length,) = next(iter(message.content.array_records[ARRAYS].values())).shape
    return int(length)


def answer(to: Message, greeting: Greeting, seed: int, length: int, scheme: Scheme) -> Message:
    """What a site says: to train a random update of so many values; of scores, that it has none."""
    kind = to.metadata.message_type
    if kind == "query.hello":
        return greeting_message(to, greeting)
    if kind == "query.fingerprint":
        return answer_message(to, status="refused")
    if kind == "train":
        drawn = np.random.default_rng(seed).standard_normal(length, dtype=np.float32) * 0.01
        metrics = {**dict.fromkeys(TRAIN_METRICS, 1.0), "annotated": 2.0}
        update = encode(torch.from_numpy(drawn), scheme)
        return answer_message(to, status="ok", metrics=metrics, update=update)
    return answer_message(to, status="ok", metrics=empty_sums())


def study_config(sites: int, strategy: str, width: int, compression: str) -> dict[str, Any]:
    """Two rounds of a study of which only the weights are large."""
    return {
        "model.width": width,
        "model.depth": 5,
        "train.patch-size": "32,32,32",
        "train.spacing": "3,3,3",
        "train.ct-window": "-150,250",
        "train.batch-size": 2,
        "data.server-cases": 0,
        "federation.rounds": 2,
        "federation.strategy": strategy,
        "federation.compression": compression,
        "federation.sites": str(sites),
        "federation.personal": False,
    }


def child(sites: int, strategy: str, folder: str, width: int, compression: str) -> None:
    """Run one study."""
    config = {**study_config(sites, strategy, width, compression), "output.dir": folder}
    scheme = scheme_of(StudyConfig.from_run_config(config).federation)

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    with contextlib.redirect_stdout(io.StringIO()):
        run = server_app.run_study(Distant(sites, scheme), Context(7, 1, {}, RecordDict(), config))
    assert (run.path / "history.jsonl").read_text().count("\n") == 3


def peak(sites: int, strategy: str, width: int, compression: str = "none") -> tuple[float, float]:
    """Seconds and peak resident memory in GB of a study's ServerApp."""
    with tempfile.TemporaryDirectory() as folder:
        return watched(
            [
                *(sys.executable, __file__, "--child"),
                *(str(sites), strategy, folder, str(width), compression),
            ]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sites, strategy, folder, width, compression = options.child
        child(int(sites), strategy, folder, int(width), compression)
        return
    few, many = (2, 5) if options.quick else SITES
    width = 4 if options.quick else 23
    jobs = [(name, "none") for name in STRATEGIES] + [("fedavg", "int8")]
    if options.quick:
        jobs = [("fedavg", "none"), ("fedavg", "int8")]
    rows = [
        f"# Memory of the ServerApp, {datetime.date.today()}",
        "",
        f"{processor()}; network of {parameters(width) / 1e6:.1f} million parameters, two rounds, "
        "peak resident memory of the process, once each",
        "",
        f"| strategy | {few} sites | {many} sites | ratio | seconds, {many} sites |",
        "|---|---|---|---|---|",
    ]
    for strategy, compression in jobs:
        least = max(few, LEAST.get(strategy, few))
        _, small = peak(least, strategy, width, compression)
        seconds, large = peak(many, strategy, width, compression)
        note = f" ({least} sites)" if least != few else ""
        name = strategy + (f", {compression}" if compression != "none" else "")
        rows.append(
            f"| {name} | {1000 * small:.0f} MB{note} | {1000 * large:.0f} MB | "
            f"{large / small:.2f} | {seconds:.0f} |"
        )
        print(rows[-1], flush=True)
    if not options.quick:
        write_result("server-memory", "\n".join(rows) + "\n")


def parameters(width: int) -> int:
    keys = {"model.width": width, "model.depth": 5, "train.patch-size": "32,32,32"}
    return parameter_count(build_model(make_plan(StudyConfig.from_run_config(keys))))


if __name__ == "__main__":
    main()
