"""What long runs say of their stages."""

from __future__ import annotations

from collections.abc import Callable


def indented(progress: Callable[[str], None]) -> Callable[[str], None]:
    """Tells the stages of a part as details of the present one: ``cli.shell.stages`` lets them come and go."""
    return lambda sentence: progress(f"  {sentence.strip()}")
