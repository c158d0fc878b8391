"""Export of PyTorch UNets to ONNX: model families, the cut, LoRAs and adapters."""
