"""``offcut bench latency``: contestants in turn, one process each, and the ratios between them."""
