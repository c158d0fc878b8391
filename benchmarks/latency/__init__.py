"""``offcut bench latency``: the denoising loop of engines and peers, timed in turns."""
