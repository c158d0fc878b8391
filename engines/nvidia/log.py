"""TensorRT's log, captured for the bundle and for error messages.

TensorRT has one logger per process, which Polygraphy provides; its lines arrive through Python's ``logging``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

_ONE_AT_A_TIME = Lock()
_INFO = 10  # the level that Polygraphy gives TensorRT's INFO


class ErrorMessages(logging.Handler):
    """TensorRT's error messages."""

    def __init__(self) -> None:
        super().__init__(level=logging.ERROR)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Polygraphy's own summaries have a higher level and say less.
        if record.levelno == logging.ERROR:
            lines = record.getMessage().strip().splitlines()
            self._lines += lines[:1]

    def clear(self) -> None:
        """Drop all messages, before another graph is built."""
        self._lines.clear()

    def reason(self, default: str = "it gives no reason") -> str:
        """Return the first line of the first message."""
        return self._lines[0].strip() if self._lines else default


@contextmanager
def captured_log(file: Path | None = None) -> Iterator[ErrorMessages]:
    """Capture TensorRT's log inside the context, and write it to a file if one is given.

    One thread captures at a time; others wait.
    """
    from polygraphy.logger import G_LOGGER

    logger = logging.getLogger("Polygraphy")
    messages = ErrorMessages()
    handlers: list[logging.Handler] = [messages]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with _ONE_AT_A_TIME:
        before = G_LOGGER.use_python_logging_system, G_LOGGER.colors, G_LOGGER.letter, logger.level, logger.propagate
        G_LOGGER.use_python_logging_system, G_LOGGER.colors, G_LOGGER.letter = True, False, False
        G_LOGGER.once_logged.clear()  # otherwise a warning appears only in the first build's log
        logger.setLevel(_INFO)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
        try:
            with G_LOGGER.verbosity(_INFO):
                yield messages
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()
            G_LOGGER.use_python_logging_system, G_LOGGER.colors, G_LOGGER.letter = before[:3]
            logger.setLevel(before[3])
            logger.propagate = before[4]
