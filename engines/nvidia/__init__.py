"""TensorRT and TensorRT-RTX, one implementation for both.

``library`` says which of the two; ``compile`` turns ONNX files into plans through Polygraphy; ``pair`` runs them.

What a machine without a GPU can prove is proven: TensorRT-RTX parses and builds for other machines there. Enterprise
TensorRT, and whatever opens or refits a plan, is exercised only where there is a GPU.
"""
