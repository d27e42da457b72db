"""A leak test as text: one row a protection, and how to read it."""

from fedseg.privacy.leakage import LeakReport
from fedseg.privacy.membership import Separation
from fedseg.report.table import drawn, headed

__all__ = ["leak_text"]


def leak_text(report: LeakReport) -> str:
    """Draw what `leakage.leak_test` returns, with what has to be said about it."""
    facts = report.facts
    title = (
        f"{facts['sites']} sites, {facts['members']} members and {facts['others']} other cases; "
        f"{facts['model']}, {facts['parameters']:,} parameters; {facts['rounds']} rounds of "
        f"{facts['steps']} steps; clip {facts['clip']:.3g}, noise multiplier "
        f"{facts['noise_multiplier']:g}; seed {facts['seed']}"
    )
    heads = ("AUC, updates", "AUC, model", "loss: members", "others", "PSNR, dB", "SSIM")
    table = headed("", ("protection", "attacker sees"), heads)
    for name, row in report.rows.items():
        table.add_row(
            name,
            row.sees,
            _interval(row.alignment),
            _interval(row.loss),
            _number(row.members_loss),
            _number(row.others_loss),
            f"{row.reconstruction.psnr:.1f}",
            f"{row.reconstruction.ssim:.2f}",
        )
    table.add_section()
    for name, found in report.guesses.items():
        cells = ["-"] * 4
        table.add_row("no update", name, *cells, f"{found.psnr:.1f}", f"{found.ssim:.2f}")
    columns = ", ".join(report.images)
    return f"{title}\n{drawn(table, _WIDTH)}{_READ}Columns of the picture: {columns}.\n"


_WIDTH = 140

_READ = """\
AUC: chance that a case the site trained with scores higher than a case of the same site it never
saw, and 95% interval over cases; .5 is guessing. "Updates": cosine of what is seen with the case's
gradient. "Model": loss under the final global model, which all sites and the server get.
PSNR and SSIM: a training patch reconstructed from one step by an attacker who knows its labels.
An attack tells something where its AUC's interval is above .5, or its PSNR above that of "labels
alone", which needs no update.
This is a LOWER bound on the risk. An attack that fails here proves nothing: real attackers have
more time, better priors and other attacks.
"""


def _interval(found: Separation) -> str:
    return f"{found.auc:.2f} ({found.low:.2f} to {found.high:.2f})"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
