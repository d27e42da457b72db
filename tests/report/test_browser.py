"""Tests of the report in a real browser: it opens without an error and nothing is cut off."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from read_page import read_page
from written_run import write_run

from fedseg.report.report import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no chromium on PATH (Debian's package is enough)"),
]

PROBE = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1);
  const names = [...document.querySelectorAll(".whole")];
  const torn = names.filter(e => e.getClientRects().length > 1);
  const boxes = [...document.querySelectorAll(".scroll")];
  document.title = `width ${innerWidth}, cut off: ${wide.map(e => e.tagName).join() || "nothing"}`
    + `, page scrolls: ${document.documentElement.scrollWidth > innerWidth}`
    + `, tables scroll: ${boxes.some(e => e.scrollWidth > e.clientWidth)}`
    + `, names in two lines: ${torn.length} of ${names.length > 0 ? "some" : "none"}`;
});
</script>
"""


def browse(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """Open a page; return what was printed, and what went wrong on its console."""
    command = [
        *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--enable-logging=stderr", "--v=0"),
        *(f"--user-data-dir={profile}", "--virtual-time-budget=2000", *options, page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One site has a name as long as a name may be, with hyphens."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "2026-11-25T00-00-00-abcd")
    for file in (*folder.glob("*.json"), folder / "history.jsonl"):
        file.write_text(file.read_text().replace("bonn", "university-hospital-bonn-venusberg"[:32]))
    return write_report(folder)


def test_opens_without_an_error_and_every_figure_has_its_text(report: Path, tmp_path: Path) -> None:
    content, console = browse(report, tmp_path, "--dump-dom")
    assert console == ""
    page = read_page(content)
    drawings = [d for d in page.all("svg") if d.attributes.get("aria-hidden") != "true"]
    assert len(drawings) == 4
    assert all(d.attributes["role"] == "img" and d.all("title")[0].text for d in drawings)
    assert len(page.all("img")) == 4 and all(image.attributes["alt"] for image in page.all("img"))


def test_an_error_would_be_noticed(report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text().replace("</body>", "<script>1</script></body>"))
    _, console = browse(broken, tmp_path / "profile", "--dump-dom")
    assert "Content Security Policy" in console


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off(report: Path, tmp_path: Path, width: int) -> None:
    """In a frame, for a browser's own window isn't as narrow as a phone.

    Tables that don't fit scroll in their own box, and a site's name stays in one line.
    """
    content = report.read_text()
    inner = re.sub(r"<meta http-equiv[^>]*>", "", content).replace("</body>", PROBE + "</body>")
    (tmp_path / "inner.html").write_text(inner)
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<!doctype html><iframe src="inner.html" style="width:{width}px;height:800px;border:0">'
        "</iframe><script>onload = () => setTimeout(() => {"
        "document.title = frames[0].document.title }, 100)</script>"
    )
    options = ("--allow-file-access-from-files", "--window-size=1400,900", "--dump-dom")
    content, console = browse(outer, tmp_path / "profile", *options)
    assert console == ""
    title = re.search("<title>(.*?)</title>", content)
    assert title and title[1] == (
        f"width {width}, cut off: nothing, page scrolls: false, "
        f"tables scroll: {str(width < 600).lower()}, names in two lines: 0 of some"
    )


def test_prints(report: Path, tmp_path: Path) -> None:
    printed = tmp_path / "report.pdf"
    browse(report, tmp_path / "profile", f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    data = printed.read_bytes()
    assert data.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 20
