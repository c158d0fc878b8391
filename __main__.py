"""``python -m offcut``."""

from .cli import main

main()
