"""Quantization of exported graphs to int8 and fp8 with Q/DQ nodes."""
