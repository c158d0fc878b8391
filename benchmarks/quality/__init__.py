"""``offcut bench quality``: what caching costs, and what fewer steps would have cost at the same latency."""
