"""Messages of secure aggregation: strict JSON, bounded in length, in counts and in every value.

Each carries the study run, the round, what the words are for, and its stage; whoever reads one says
which it expects. Only the masked words travel apart from these, as an array.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from fedseg.errors import ProtocolError
from fedseg.privacy.graph import LEAST_SITES, MOST_SITES
from fedseg.privacy.secagg_keys import SECRET_BYTES

__all__ = [
    "PURPOSES",
    "Advert",
    "Begin",
    "Confirmation",
    "Confirming",
    "Hex",
    "Inbox",
    "Keys",
    "Purpose",
    "Revealed",
    "Roster",
    "Shares",
    "Unmasking",
    "Uploaded",
    "pack",
    "unpack",
]

_MOST_BYTES = 2**20


def _from_hex(value: object) -> object:
    return bytes.fromhex(value) if isinstance(value, str) else value


Hex = Annotated[bytes, BeforeValidator(_from_hex), PlainSerializer(bytes.hex, return_type=str)]
_Key = Annotated[Hex, Field(min_length=32, max_length=32)]
_Secret = Annotated[Hex, Field(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
_Signature = Annotated[Hex, Field(min_length=64, max_length=64)]
_Ciphertext = Annotated[Hex, Field(min_length=48, max_length=48)]
"""Two shares of 16 bytes and the tag of AES-GCM."""

_Index = Annotated[int, Field(ge=0, lt=MOST_SITES)]
_Indices = Annotated[tuple[_Index, ...], Field(max_length=MOST_SITES)]


Purpose = Literal["train", "evaluate", "final"]
PURPOSES: tuple[Purpose, ...] = ("train", "evaluate", "final")
"""What words are for, in the order of a round: updates, scores of the global model, and at the end
those of the sites' own models. Each is a protocol of its own, with keys of its own."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Message(_Strict):
    """What every message has: its stage, the study run, the round, what the words are for."""

    stage: str
    run: str = Field(pattern=r"^[\w.-]{1,64}$")
    round: int = Field(ge=1, lt=2**31)
    purpose: Purpose


class Advert(_Strict):
    """A site's public keys of a round.

    Attributes:
        name: Its own name for itself; peers' pinned keys go by it.
        channel: Public key for its peers' shares.
        mask: Public key for the masks.
        commitment: Of its self-mask secret.
        signature: Over all that and the round, None where it has no signing key.
    """

    name: str = Field(pattern=r"^[a-z0-9-]{0,32}$")
    channel: _Key
    mask: _Key
    commitment: _Key
    signature: _Signature | None = None


class Begin(_Message):
    """Server to sites: asks for their public keys."""

    stage: Literal["begin"] = "begin"


class Keys(_Message):
    """Site to server: its public keys."""

    stage: Literal["keys"] = "keys"
    advert: Advert


class Roster(_Message):
    """Server to sites: the public keys of all; a site's place in it is its index in the round."""

    stage: Literal["roster"] = "roster"
    adverts: Annotated[tuple[Advert, ...], Field(min_length=LEAST_SITES, max_length=MOST_SITES)]


class Shares(_Message):
    """Site to server: for each neighbour the two shares it holds, encrypted."""

    stage: Literal["shares"] = "shares"
    sealed: Annotated[tuple[tuple[_Index, _Ciphertext], ...], Field(max_length=MOST_SITES)]


class Inbox(_Message):
    """Server to a site: what its neighbours encrypted for it; who sent nothing is out."""

    stage: Literal["inbox"] = "inbox"
    sealed: Annotated[tuple[tuple[_Index, _Ciphertext], ...], Field(max_length=MOST_SITES)]


class Uploaded(_Message):
    """Site to server, beside the masked words."""

    stage: Literal["upload"] = "upload"


class Confirming(_Message):
    """Server to sites, where keys are pinned: whose words are in the sum."""

    stage: Literal["confirm"] = "confirm"
    survivors: _Indices


class Confirmation(_Message):
    """Site to server: its signature over the survivors."""

    stage: Literal["confirmation"] = "confirmation"
    signature: _Signature


class Unmasking(_Message):
    """Server to sites: whose words are in the sum, and who signed that.

    Its one list decides which of a site's two shares is revealed, so no message asks for both.
    """

    stage: Literal["unmask"] = "unmask"
    survivors: _Indices
    signatures: Annotated[tuple[tuple[_Index, _Signature], ...], Field(max_length=MOST_SITES)] = ()


class Revealed(_Message):
    """Site to server: of each survivor the share of its self-mask secret, else of its mask key."""

    stage: Literal["reveal"] = "reveal"
    shares: Annotated[tuple[tuple[_Index, _Secret], ...], Field(max_length=MOST_SITES)]


Kind = TypeVar("Kind", bound=_Message)


def pack(message: BaseModel) -> bytes:
    """Write a message as JSON."""
    return message.model_dump_json().encode()


def unpack(kind: type[Kind], data: object, stamp: Mapping[str, object]) -> Kind:
    """Read a message of one kind.

    Args:
        kind: The kind.
        data: The message.
        stamp: Study run, round and purpose that it must have, or some of them.

    Raises:
        ProtocolError: It is malformed, or of another stage, run, round or purpose: replayed or out
            of turn.
    """
    if not isinstance(data, bytes) or len(data) > _MOST_BYTES:
        raise ProtocolError(
            f"a message: got none or too much; expected {_MOST_BYTES} bytes at most"
        )
    try:
        found = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"{kind.__name__.lower()} message: {where} {first['msg']}") from None
    if "stage" not in found.model_fields_set or any(
        getattr(found, key) != value for key, value in stamp.items()
    ):
        expected = ", ".join(f"{key} {value}" for key, value in stamp.items())
        raise ProtocolError(
            f"{kind.__name__.lower()} message: got one of another run, round, purpose or stage; "
            f"expected {expected}"
        )
    return found
