"""Tracing of PyTorch networks and their conversion to ONNX."""
