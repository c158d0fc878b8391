"""``offcut bench quality``: the image quality that caching costs, compared with fewer steps at the same latency."""
