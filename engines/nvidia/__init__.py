"""The engines ``tensorrt`` and ``tensorrt-rtx``, which share one implementation.

``library`` loads one of the two libraries, ``compile`` turns ONNX files into plans through Polygraphy, and ``pair``
runs the plans.

Everything that needs no GPU is tested without one: TensorRT-RTX parses graphs and builds plans for other machines.
Enterprise TensorRT, and the code that opens or refits a plan, runs only where there is a GPU.
"""
