"""Attentions that share a query are told apart: TensorRT-RTX 1.7's builder ends its process on them.

An IP-Adapter's layers attend to the text and to each image with one query. Factors that are powers of two, on the query
and inverse on the key, make them different to the builder and change no bit of the product (arXiv 2308.06721, equation
5, has both attentions).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def tell_apart(trt: Any, network: Any, sharing: int) -> None:
    """Give each of so many neighbouring attentions of a network another factor.

    Args:
        trt: the module.
        network: as the parser made it; changed in place.
        sharing: how many attentions have the same query; they follow one another in the network.
    """
    attentions = [layer for layer in map(network.get_layer, range(network.num_layers)) if _is_attention(trt, layer)]
    for index, layer in enumerate(attentions):
        factor = 2.0 ** (index % sharing)
        if factor != 1:
            for place, by in ((0, factor), (1, 1 / factor)):  # query, key: [batch, heads, tokens, width]
                layer.set_input(place, _times(trt, network, layer.get_input(place), by))


def _is_attention(trt: Any, layer: Any) -> bool:
    return bool(layer.type == trt.LayerType.ATTENTION_INPUT)


def _times(trt: Any, network: Any, tensor: Any, factor: float) -> Any:
    constant = network.add_constant((1,) * len(tensor.shape), np.full((1,), factor, np.float32)).get_output(0)
    if tensor.dtype != trt.float32:
        constant = network.add_cast(constant, tensor.dtype).get_output(0)
    return network.add_elementwise(tensor, constant, trt.ElementWiseOperation.PROD).get_output(0)
