"""How the cached features move, what a schedule misses of that, and what it does to the pictures."""
