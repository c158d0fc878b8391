"""Suppression of the libraries' own output."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Suppress the progress bars and notes of diffusers and transformers; their errors are still shown."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
