"""The federation: what every round needs, and the messages it sends."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedseg.arrays import state_to_arrays
from fedseg.config import StudyConfig
from fedseg.data.plan import Plan
from fedseg.federation.checkpoints import Progress
from fedseg.federation.flat import flatten, layout_of
from fedseg.federation.reduce import Reducer
from fedseg.federation.run_folder import RunFolder
from fedseg.federation.sites import KnownSite
from fedseg.messages import ARRAYS, BUFFERS, CONFIG, Task, study_text
from fedseg.peers import Peers
from fedseg.segmentation.sharing import SplitState, split_state

__all__ = [
    "Federation",
    "ServerEvaluation",
    "Summary",
    "Unread",
    "messages_to",
    "outside_rounds",
]

Summary = dict[str, float | int | None]


class ServerEvaluation(Protocol):
    """Scores a network on the server's own cases."""

    def __call__(self, network: nn.Module, *, distances: bool = False) -> dict[str, Summary]:
        """Return name of a set of cases to its summary; surface distances only if asked for."""


@dataclass(frozen=True, kw_only=True)
class Unread:
    """A message whose answer wasn't waited for, or not any longer.

    Attributes:
        site: Name of the site.
        round: The round.
        busy: Whether the site may still be at work on it.
    """

    site: str
    round: int
    busy: bool


@dataclass
class Federation:
    """All that the rounds need.

    Attributes:
        grid: Flower's grid.
        study: The study config.
        plan: The plan.
        sites: The sites, in order of their names.
        network: The global model.
        strategy: Flower's strategy.
        reduce: Makes one change out of the sites' updates.
        folder: The run folder.
        evaluate: Scores a network on the server's own cases: `global`, `unseen`.
        progress: How far the run is.
        tell: Is told each line of the history, once it is written.
        received: What came outside the rounds, for `manifest.json`.
        unread: Messages by id whose answers nobody waits for; see `secure_round.take_unread`.
    """

    grid: Grid
    study: StudyConfig
    plan: Plan
    sites: list[KnownSite]
    network: nn.Module
    strategy: Strategy
    reduce: Reducer
    folder: RunFolder
    evaluate: ServerEvaluation
    progress: Progress = field(default_factory=Progress)
    tell: Callable[[Mapping[str, Any]], None] = lambda _: None
    received: list[dict[str, Any]] = field(default_factory=list)
    unread: dict[str, Unread] = field(default_factory=dict)

    @property
    def free(self) -> list[KnownSite]:
        """Sites that aren't at work on an earlier round."""
        return [site for site in self.sites if site.name not in self.progress.late]

    def split(self) -> SplitState:
        """Split the global model's state into shared, local and integer tensors."""
        return split_state(self.network, self.study.federation.shared)

    def task(self, number: int, *, final: bool = False) -> ConfigRecord:
        """Make the config of a round's messages."""
        return Task(
            study_run=self.folder.run_id,
            config_digest=self.study.digest(),
            plan=self.plan.to_json(),
            round_number=number,
            rounds=self.study.federation.rounds,
            final=final,
            peers=Peers.of([site.name for site in self.sites]),
            study=study_text(self.study),
        ).to_record()

    def content(self, config: ConfigRecord) -> RecordDict:
        """Pack the global model and a config: the same for every site."""
        state = self.split()
        layout = layout_of(state.shared)
        # Flower asks for each array on its own; of one vector it asks once, and once a chunk.
        vector = {layout.digest: flatten(state.shared, layout)}
        dtype = torch.float16 if self.study.federation.download == "fp16" else None
        content = RecordDict({ARRAYS: state_to_arrays(vector, dtype=dtype), CONFIG: config})
        if state.fixed:
            content[BUFFERS] = state_to_arrays(state.fixed)
        return content


def outside_rounds(
    site: str,
    received: Mapping[str, Mapping[str, str]],
    *,
    reason: str | None = None,
    final: bool = False,
) -> list[dict[str, Any]]:
    """Entries of `received` in `manifest.json`.

    Args:
        site: The site's name.
        received: What came from it, see `Receipt.entry`.
        reason: Code of why its answer is none, None where it is one.
        final: Whether it came after the last round.
    """
    return [
        {
            "site": site,
            "kind": kind,
            **({"final": True} if final else {}),
            "reason": reason,
            **entry,
        }
        for kind, entry in received.items()
    ]


def messages_to(sites: Sequence[KnownSite], content: RecordDict, kind: str) -> dict[str, Message]:
    """One message of a kind for each site, by its name."""
    return {
        site.name: Message(content, dst_node_id=site.node_id, message_type=kind) for site in sites
    }
