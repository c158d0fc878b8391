"""Libraries that print as they like, kept quiet."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Keep diffusers' and transformers' own progress bars and notes off the terminal; their errors still come."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
