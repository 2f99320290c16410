r"""The weights of an OpenVINO graph as integers of 8 or 4 bits, and nothing else: what models that write are quantized to.

    w ≈ s_g (u - z_g)        a scale and a zero point for every `GROUP` inputs of an output; with 8 bits for all of them

by NNCF, which gives tables and the matrix that makes the logits 8 bits in both cases, and 8 bits to a matrix whose inputs are made
up of no groups of `LEAST`. Codes that the model brings (`_own_codes`) are taken as they are, in the form that NNCF writes: the
processor's kernels know it, and multiply with the integers.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np

from ._own_codes import Codes, OwnCodes
from ._traced import quiet

GROUP, LEAST = 32, 16
"""Inputs that share a scale where NNCF rounds to 4 bits; fewest, there and of codes that a model brings."""


def integer_weights(graph: Any, bits: int, own: OwnCodes | None = None) -> Any:
    """A graph with integer weights.

    Args:
        graph: an `openvino.Model`; used up.
        bits: 8 or 4.
        own: codes that the model brings.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode

    _keep(graph, own or OwnCodes())
    options: dict[str, Any] = {}
    if bits == 4:
        odd = AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=LEAST)
        options = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": GROUP, "advanced_parameters": odd}
    with quiet():
        return nncf.compress_weights(graph, **options)


def _keep(graph: Any, own: OwnCodes) -> None:
    """Put the model's own codes where the floats are that they stand for."""
    from openvino import Type
    from openvino import opset13 as ops

    if not own.known:
        return
    for constant in [op for op in graph.get_ops() if op.get_type_name() == "Constant"]:
        output = constant.output(0)
        if output.get_element_type() != Type.f32 or len(output.get_shape()) != 2:
            continue
        readers, weight = list(output.get_target_inputs()), np.array(constant.data)
        for turned, found in ((False, own.find(weight)), (True, own.find(weight.T))):
            width = gcd(found.group, found.codes.shape[1]) if found else 0
            if found is None or width < min(LEAST, found.codes.shape[1]):
                continue
            own.hold(weight.T if turned else weight)
            found = found.in_8_bits() if width % 2 else found  # two codes of a byte in different rows are read wrongly
            node = _floats(found, width, constant.get_friendly_name())
            node = ops.transpose(node, np.array([1, 0])) if turned else node
            for reader in readers:
                reader.replace_source_output(node.output(0))
            break


def _floats(codes: Codes, width: int, name: str) -> Any:
    """A node that makes s (u - z) of stored integers, (rows, inputs)."""
    from openvino import Type
    from openvino import opset13 as ops

    rows, inputs = codes.codes.shape
    (scales, zeros), number = codes.in_groups(width), _least(codes.scales, codes.zeros)
    shape = [rows, inputs] if width == inputs else [rows, inputs // width, width]
    one = [*shape[:-1], 1]
    whole = codes.codes ^ np.uint8(2 ** (codes.bits - 1)) if codes.symmetric else codes.codes
    node = ops.convert(_integers(whole, shape, codes.bits, signed=codes.symmetric, name=name), number)
    if not codes.symmetric and codes.whole:
        node = ops.subtract(node, ops.convert(_integers(zeros.astype(np.uint8), one, codes.bits, signed=False), number))
    elif not codes.symmetric:
        node = ops.subtract(node, ops.constant(zeros.reshape(one).astype(number)))
    node = ops.multiply(node, ops.constant(scales.reshape(one).astype(number)))
    node = node if len(shape) == 2 else ops.reshape(node, np.array([rows, inputs]), False)
    return node if number == np.float32 else ops.convert(node, Type.f32)


def _integers(codes: np.ndarray, shape: list[int], bits: int, *, signed: bool, name: str = "") -> Any:
    """A constant of whole numbers; the bits of signed ones are those of their two's complement."""
    import openvino
    from openvino import opset13 as ops

    kinds = {(4, True): "i4", (4, False): "u4", (8, True): "i8", (8, False): "u8"}
    flat = codes.ravel()
    if bits == 4:
        flat = np.pad(flat, (0, flat.size % 2))
        flat = flat[::2] | flat[1::2] << 4
    tensor = openvino.Tensor(getattr(openvino.Type, kinds[bits, signed]), openvino.Shape(shape))  # with memory of its own
    tensor.data.view(np.uint8).reshape(-1)[:] = flat
    made = ops.constant(tensor)
    if name:
        made.set_friendly_name(name)
    return made


def _least(*values: np.ndarray) -> type:
    """float16 where that has all of these numbers, else float32."""
    with np.errstate(over="ignore"):
        return np.float16 if all((value.astype(np.float16) == value).all() for value in values) else np.float32
