"""What TensorRT says of a build or of a plan, kept for the bundle and for error messages.

TensorRT has one logger a process, which Polygraphy provides; its lines come here through Python's ``logging``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

_ONE_AT_A_TIME = Lock()
_COMPLAINT = logging.ERROR
_NOTE = 10  # TensorRT's INFO, as Polygraphy ranks it


class Messages(logging.Handler):
    """What went wrong, in TensorRT's words."""

    def __init__(self) -> None:
        super().__init__(level=_COMPLAINT)
        self._complaints: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Above it are Polygraphy's own summaries, which say less.
        if record.levelno == _COMPLAINT:
            lines = record.getMessage().strip().splitlines()
            self._complaints += lines[:1]

    def forget(self) -> None:
        """Begin anew, for another graph."""
        self._complaints.clear()

    def reason(self, otherwise: str = "it gives no reason") -> str:
        """The first line of the first complaint."""
        return self._complaints[0].strip() if self._complaints else otherwise


@contextmanager
def listening(file: Path | None = None) -> Iterator[Messages]:
    """Gather what TensorRT says for as long as it lasts, and write all of it to a file if one is given.

    One listener at a time; a second waits.
    """
    from polygraphy.logger import G_LOGGER

    logger = logging.getLogger("Polygraphy")
    messages = Messages()
    handlers: list[logging.Handler] = [messages]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with _ONE_AT_A_TIME:
        before = G_LOGGER.use_python_logging_system, G_LOGGER.colors, G_LOGGER.letter, logger.level, logger.propagate
        G_LOGGER.use_python_logging_system, G_LOGGER.colors, G_LOGGER.letter = True, False, False
        G_LOGGER.once_logged.clear()  # each file has the warnings that an earlier build had, too
        logger.setLevel(_NOTE)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
        try:
            with G_LOGGER.verbosity(_NOTE):
                yield messages
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()
            G_LOGGER.use_python_logging_system, G_LOGGER.colors, G_LOGGER.letter = before[:3]
            logger.setLevel(before[3])
            logger.propagate = before[4]
