"""Run one study in a process of its own, and die where the test says: `one_run.py ARGUMENTS.json`.

What `kill -9` or a full disk does to a process can't be shown within pytest's own.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from local_grid import SMALL, LocalGrid

from fedseg import server_app
from fedseg.errors import FedSegError
from fedseg.federation import collect, rounds, secure_sum, train_round
from fedseg.privacy import secagg_server
from fedseg.segmentation import tensor_file

# Stage of round 2 of a run with three sites: a function, killed before or after its n-th call (of
# `save_file`, which sites and spool call as well: that for the checkpoint).
STAGES: dict[str, tuple[Any, str, str, int]] = {
    "before-send": (train_round, "collect", "before", 2),
    "while-collecting": (collect, "spool", "after", 4),
    "while-aggregating": (train_round, "next_state", "before", 2),
    "before-saving": (rounds, "save_checkpoint", "before", 3),
    "while-saving": (tensor_file, "save_file", "after", 3),
    "after-saving": (rounds, "save_checkpoint", "after", 3),
}

# The same under secure aggregation: a round unmasks two sums, of updates and of scores.
SECURE_STAGES: dict[str, tuple[Any, str, str, int]] = {
    "secure-sending": (secure_sum, "_uploads", "before", 3),
    "secure-unmasking": (secagg_server, "unmask", "before", 3),
    "secure-scoring": (rounds, "secure_scores", "before", 2),
}


def is_checkpoint(path: Path) -> bool:
    return "state.safetensors" in path.name


def die(*, module: Any, name: str, when: str, call: int) -> None:
    """Kill this process before or after the n-th call of a function."""
    real, calls = getattr(module, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += name != "save_file" or is_checkpoint(args[1])
        if calls == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)


def fill_disk(*, at_save: int, limit: int) -> None:
    """From the n-th checkpoint on no file may grow past a limit, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real, calls = tensor_file.save_file, 0

    def limited(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += is_checkpoint(args[1])
        if calls == at_save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        real(*args, **kwargs)

    tensor_file.save_file = limited


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    if arguments["stage"] == "full-disk":
        fill_disk(at_save=3, limit=10_000)
    elif arguments["stage"]:
        module, name, when, call = {**STAGES, **SECURE_STAGES}[arguments["stage"]]
        die(module=module, name=name, when=when, call=call)
    run_config = {**SMALL, **arguments["config"]}
    nodes = {int(node): config for node, config in arguments["nodes"].items()}
    try:
        grid = LocalGrid(nodes, run_config)
        server_app.run_study(grid, Context(7, 1, {}, RecordDict(), run_config))
    except FedSegError as error:
        print(f"fedseg: {error}", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
