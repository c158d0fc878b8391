"""ONNX Runtime: the pair of engines, its execution providers, and the passes over its graphs."""
