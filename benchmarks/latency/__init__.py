"""Latency of engines and peers on one denoising loop, measured in turns."""
