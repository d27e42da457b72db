"""Read a page as a browser's accessibility tree would, with the standard library alone."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

INLINE = {"p", "a", "strong", "small", "td", "th", "dd", "dt"}
VOID = {"meta", "img", "br", "hr", "input", "link"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parts: list["Element | str"] = field(default_factory=list)

    @property
    def children(self) -> list["Element"]:
        return [part for part in self.parts if isinstance(part, Element)]

    def all(self, *tags: str) -> list["Element"]:
        found = [self] if self.tag in tags else []
        for child in self.children:
            found += child.all(*tags)
        return found

    @property
    def text(self) -> str:
        """Its words in order, with single spaces; elements in a line of text don't part words."""
        told = (part if isinstance(part, str) else part.text for part in self.parts)
        return " ".join(("" if self.tag in INLINE else " ").join(told).split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def read_page(content: str) -> Element:
    """Parse a page whose elements all have to be closed in order."""
    reader = _Reader()
    reader.feed(content)
    reader.close()
    (page,) = reader.open
    return page


def row_of(page: Element, head: str, *, caption: str = "") -> list[str]:
    """Cells of the row with this head, in the first table whose caption has these words."""
    for table in page.all("table"):
        if caption in table.all("caption")[0].text:
            for row in table.all("tr"):
                cells = row.all("th", "td")
                if cells[0].text == head:
                    return [cell.text for cell in cells[1:]]
    raise AssertionError(f"no row '{head}' under '{caption}'")
