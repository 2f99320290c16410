r"""The weights of a graph as 8-bit integers, and nothing else: what models that write are quantized to for onnxruntime.

    matrices    w ≈ s_b q, a scale for every 32 inputs of an output (`MatMulNBits`, whose kernels round activations block by block)
    tables      w ≈ s_r q, a scale for every row

One scale for all of a layer's activations, as dynamic quantization has it, does not do here: a few features of language models are
hundreds of times as large as the others (Dettmers et al. 2022, arXiv:2208.07339, section 4), and SmolLM2 forgets what it knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK, LARGEST = 32, 127
ROUNDS_ACTIVATIONS = 4
"""`accuracy_level` of onnxruntime's operator: products of integers, with activations rounded in blocks too."""
WORTH_IT = 1024
"""Entries of a table at least."""


def int8_weights(graph: Any) -> Any:
    """A graph with 8-bit weights.

    Args:
        graph: an `onnx.ModelProto`; used up.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    plain = ONNXModel(graph)
    plain.replace_gemm_with_matmul()
    _transpose(plain.model.graph)
    _tables(plain.model.graph)
    found: Any = MatMulNBitsQuantizer(
        plain.model,
        bits=8,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=ROUNDS_ACTIVATIONS,
        op_types_to_quantize=("MatMul",),
    )
    found.process()
    found.model.clean_initializers()
    return found.model.model


def _transpose(graph: Any) -> None:
    """Matrices that are transposed whenever they are used, as an output layer is that is the table of embeddings too."""
    from onnx import numpy_helper

    there = {tensor.name: tensor for tensor in graph.initializer}
    turned = [
        node for node in graph.node if node.op_type == "Transpose" and len(getattr(there.get(node.input[0]), "dims", ())) == 2
    ]
    for node in turned:
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(there[node.input[0]]).T.copy(), node.output[0]))
        graph.node.remove(node)


def _tables(graph: Any) -> None:
    """Rows that are looked up, float -> integers, and a scale that is looked up with each."""
    from onnx import TensorProto, helper, numpy_helper

    there, made = {tensor.name: tensor for tensor in graph.initializer}, dict[str, Any]()
    nodes = []
    for node in graph.node:
        table = there.get(node.input[0]) if node.op_type == "Gather" else None
        flat = table is not None and len(table.dims) == 2 and table.data_type == TensorProto.FLOAT
        if not flat or table is None or np.prod(table.dims) < WORTH_IT or any(a.name == "axis" and a.i for a in node.attribute):
            nodes.append(node)
            continue
        rows, scales = f"{table.name}_int8", f"{table.name}_scale"
        if table.name not in made:
            values = numpy_helper.to_array(table)
            largest = np.abs(values).max(1, keepdims=True) / LARGEST
            step = np.where(largest > 0, largest, 1.0).astype(np.float32)
            made[table.name] = [
                numpy_helper.from_array(np.rint(values / step).astype(np.int8), rows),
                numpy_helper.from_array(step, scales),
            ]
        out = node.output[0]
        nodes += [
            helper.make_node("Gather", [rows, node.input[1]], [f"{out}_q"]),
            helper.make_node("Cast", [f"{out}_q"], [f"{out}_f"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [scales, node.input[1]], [f"{out}_s"]),
            helper.make_node("Mul", [f"{out}_f", f"{out}_s"], [out]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for pair in made.values() for tensor in pair)
