"""``offcut bench precision``: what low precision saves and costs, alone and together with caching."""
