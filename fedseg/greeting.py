"""A site's answer to `query.hello`: who it is, and whether it can take part."""

from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from fedseg.errors import Reason
from fedseg.messages import flower_error
from fedseg.receipts import Receipt, receipt_of
from fedseg.site_config import valid_site_name

__all__ = ["SITE", "Greeting", "greeting_message", "read_greeting"]

SITE = "site"


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """A site's answer to `query.hello`.

    Attributes:
        name: Its own name for itself, `""` if it has none.
        simulated: Whether it is simulated.
        sites: Number of simulated sites.
        reason: Why it can't take part, None if it can.
        receipt: What came, at the server.
    """

    name: str = ""
    simulated: bool = False
    sites: int = 0
    reason: Reason | None = None
    receipt: Receipt | None = None


def greeting_message(to: Message, greeting: Greeting) -> Message:
    """Pack a site's answer to hello."""
    record = ConfigRecord(
        {
            "name": greeting.name,
            "simulated": greeting.simulated,
            "sites": greeting.sites,
            "reason": greeting.reason.value if greeting.reason else "",
        }
    )
    return Message(RecordDict({SITE: record}), reply_to=to)


def read_greeting(message: Message) -> Greeting:
    """Unpack a site's answer to hello; a name that isn't `[a-z0-9-]{1,32}` counts as none."""
    if message.has_error():
        return Greeting(reason=flower_error(message)[0])
    record = message.content.config_records.get(SITE, ConfigRecord())
    name, sites, code = record.get("name"), record.get("sites"), record.get("reason")
    return Greeting(
        name=name if isinstance(name, str) and valid_site_name(name) else "",
        simulated=record.get("simulated") is True,
        sites=sites if isinstance(sites, int) and 0 <= sites < 10**6 else 0,
        reason=Reason(code) if code in list(Reason) else None,
        receipt=receipt_of(message),
    )
