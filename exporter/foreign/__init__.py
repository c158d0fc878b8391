"""ONNX graphs from other exporters, converted to offcut's contract."""
