"""Progress messages of nested stages."""

from __future__ import annotations

from collections.abc import Callable


def indented(progress: Callable[[str], None]) -> Callable[[str], None]:
    """Return a callback that shows its messages as details of the current stage; see ``cli.shell.stages``."""
    return lambda sentence: progress(f"  {sentence.strip()}")
