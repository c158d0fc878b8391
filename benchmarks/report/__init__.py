"""``offcut bench report`` and ``compare``: a self-contained page for results, and changes between two results."""
