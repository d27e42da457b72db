"""What a site keeps between the messages of a round of secure aggregation, as small JSON."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedseg.errors import ProtocolError
from fedseg.privacy.secagg_wire import PURPOSES, Advert, Hex, Purpose

__all__ = ["Held", "State"]


class Held(BaseModel):
    """A neighbour's shares, or the site's own: of its self-mask secret and of its mask key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    self_mask: Hex
    mask: Hex


class State(BaseModel):
    """What a site keeps between the messages of a round.

    Attributes:
        run: Study run of the last round it took part in.
        round: That round.
        purpose: What its words are for.
        stage: The last step it did.
        channel, mask, self_mask: Its own secrets, until they are used.
        adverts: Public keys of all sites.
        index: Its own place among them.
        held: By index the shares it holds, its own among them.
        survivors: The survivors it signed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: str
    round: int
    purpose: Purpose = "train"
    stage: Literal["keys", "shares", "received", "masked", "confirmed", "done"]
    channel: Hex = b""
    mask: Hex = b""
    self_mask: Hex = b""
    adverts: tuple[Advert, ...] = ()
    index: int = -1
    held: dict[int, Held] = {}
    survivors: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Where in the run it is: rises from step to step of the run."""
        return self.round, PURPOSES.index(self.purpose)

    def to_json(self) -> str:
        """Write the state."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_json(cls, text: str) -> "State":
        """Read a state.

        Raises:
            ProtocolError: It is damaged.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            raise ProtocolError("secure aggregation: the stored state can't be read") from None
