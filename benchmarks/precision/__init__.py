"""``offcut bench precision``: speed and quality of low precision, alone and together with caching."""
