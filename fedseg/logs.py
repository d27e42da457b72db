"""Show the package's log lines; libraries only log, the apps and the command line call this."""

import logging
import sys

__all__ = ["show_logs"]


def show_logs(level: int = logging.INFO) -> None:
    """Print `fedseg` log lines to standard error, once a process."""
    logger = logging.getLogger("fedseg")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("fedseg: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
