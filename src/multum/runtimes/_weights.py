r"""The weights of a graph as integers of 8 or 4 bits, and nothing else: what models that write are quantized to for onnxruntime.

    w ≈ s_g (u - z_g)        a scale for every `BLOCK` inputs of an output (`MatMulNBits`, whose kernels round activations too)

One scale for all of a layer's activations, as dynamic quantization has it, does not do here: a few features of language models are
hundreds of times as large as the others (Dettmers et al. 2022, arXiv:2208.07339, section 4), and SmolLM2 forgets what it knows.

The matrix that makes the logits has 8 bits in both cases, and so have tables that are looked up, with a scale for every row. A
table that makes the logits too is stored once, in blocks. Zero points are in the middle; codes that the model brings are taken as
they are, with their own (`_own_codes`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from ._own_codes import Codes, OwnCodes
from ._traced import quiet

BLOCK, LEAST, MOST = 32, 16, 128
"""Inputs that share a scale where the library rounds; fewest and most in a block of codes that a model brings. Powers of two."""
ROUNDS_ACTIVATIONS = 4
"""`accuracy_level` of onnxruntime's operator: products of integers, with activations rounded in blocks too."""
WORTH_IT = 1024
"""Entries of a table at least."""
LOGITS = "logits"


def integer_weights(graph: Any, bits: int, own: OwnCodes | None = None) -> Any:
    """A graph with integer weights.

    Args:
        graph: an `onnx.ModelProto`; used up.
        bits: 8 or 4.
        own: codes that the model brings.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    plain = ONNXModel(graph)
    plain.replace_gemm_with_matmul()
    plain.set_opset_import("com.microsoft", 1)
    inner, own = plain.model.graph, own or OwnCodes()
    _transpose(inner)
    for number, node in enumerate(inner.node):
        node.name = node.name or f"node_{number}"
    tables = _tables(inner)
    ties = _keep(inner, tables, own)
    found = plain.model
    if bits < 8:
        tied = {node.name for node in inner.node if node.op_type == "MatMul" and node.input[1] in ties.values()}
        found = _rounded(found, 8, left={node.name for node in inner.node} - tied - _output(inner))
    found = _rounded(found, bits)
    _look_up(found.graph, tables, ties, own)
    cleaned = ONNXModel(found)
    cleaned.clean_initializers()
    return cleaned.model


def _rounded(model: Any, bits: int, left: Collection[str] = ()) -> Any:
    """All constant matrices but those of the nodes that are left, by the library."""
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        found: Any = MatMulNBitsQuantizer(
            model,
            bits=bits,
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=ROUNDS_ACTIVATIONS,
            nodes_to_exclude=list(left),
            op_types_to_quantize=("MatMul",),
        )
        found.process()
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


def _tables(graph: Any) -> dict[str, np.ndarray]:
    """What rows are looked up in, by name."""
    from onnx import TensorProto, numpy_helper

    there, found = {tensor.name: tensor for tensor in graph.initializer}, dict[str, np.ndarray]()
    for node in graph.node:
        table = there.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type != TensorProto.FLOAT or len(table.dims) != 2 or np.prod(table.dims) < WORTH_IT:
            continue
        if not any(attribute.name == "axis" and attribute.i for attribute in node.attribute):
            found[table.name] = numpy_helper.to_array(table)
    return found


def _output(graph: Any) -> set[str]:
    """The name of the node whose matrix makes the logits, if the graph has any: the last one on the way to them."""
    made_by = {name: node for node in graph.node for name in node.output}
    node = made_by.get(LOGITS) if LOGITS in {value.name for value in graph.output} else None
    while node is not None and node.op_type not in ("MatMul", "MatMulNBits"):
        node = next((made_by[name] for name in node.input if name in made_by), None)
    return set() if node is None else {node.name}


def _keep(graph: Any, tables: dict[str, np.ndarray], own: OwnCodes) -> dict[str, str]:
    """Store the matrices that have codes of their own; those of tables in 8 bits, with a scale for every block.

    Returns:
        Name of a table -> that of the matrix that is the same, transposed.
    """
    from onnx import helper, numpy_helper

    there, ties = {tensor.name: tensor for tensor in graph.initializer}, dict[str, str]()
    for number, node in enumerate(graph.node):
        matrix = there.get(node.input[1]) if node.op_type == "MatMul" else None
        if matrix is None or len(matrix.dims) != 2:
            continue
        weight = numpy_helper.to_array(matrix).T
        same = next((name for name, table in tables.items() if table.shape == weight.shape and (table == weight).all()), None)
        ties |= {same: matrix.name} if same else {}
        codes = own.find(weight)
        block = _block(codes) if codes else 0
        if not codes or not block:
            continue
        own.hold(weight)
        codes = codes.in_8_bits() if same else codes
        names = _store(graph, matrix.name, codes, block)
        told = {"N": weight.shape[0], "K": weight.shape[1], "bits": codes.bits, "block_size": block}
        told["accuracy_level"] = ROUNDS_ACTIVATIONS
        new = helper.make_node("MatMulNBits", [node.input[0], *names], [node.output[0]], node.name, domain="com.microsoft", **told)
        graph.node[number].CopyFrom(new)
    return ties


def _block(codes: Codes) -> int:
    """The largest block that the groups are made of; 0 if the operator has none. A scale for a whole row does for any."""
    width = min(codes.group, codes.codes.shape[1])
    block = min(width & -width, MOST)  # the largest power of two in it
    return block if block >= LEAST else BLOCK if codes.scales.shape[1] == 1 else 0


def _store(graph: Any, name: str, codes: Codes, block: int) -> list[str]:
    """Codes, scales and, where these are not in the middle, zero points as the operator has them; their names, which are those that
    the library gives."""
    from onnx import numpy_helper

    rows, inputs = codes.codes.shape
    blocks = np.pad(codes.codes, ((0, 0), (0, -inputs % block))).reshape(rows, -1, block)
    scales, zeros = codes.in_groups(block)
    stored = {f"Q{codes.bits}": blocks if codes.bits == 8 else _two_in_one(blocks), "scales": scales}
    if not codes.symmetric:
        whole = zeros.astype(np.uint8)
        stored["zero_points"] = (whole if codes.bits == 8 else _two_in_one(whole)) if codes.whole else zeros
    graph.initializer.extend(numpy_helper.from_array(value, f"{name}_{end}") for end, value in stored.items())
    return [f"{name}_{end}" for end in stored]


def _two_in_one(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, two to a byte, the first one low; an odd one is alone."""
    even = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return even[..., ::2] | even[..., 1::2] << 4


def _look_up(graph: Any, tables: dict[str, np.ndarray], ties: dict[str, str], own: OwnCodes) -> None:
    """Rows of integers with their scales in the place of rows of floats; of a tied table those of the matrix."""
    for name, table in tables.items():
        if name in ties:
            continue
        codes = own.find(table)
        if codes:
            own.hold(table)
        codes = codes.in_8_bits() if codes else _by_rows(table)
        _store(graph, name, codes, min(codes.group, table.shape[1]))
    there, nodes = {tensor.name: tensor for tensor in graph.initializer}, []
    for node in graph.node:
        found = node.op_type == "Gather" and node.input[0] in tables
        nodes += _rows(graph, there, node, ties.get(node.input[0], node.input[0]), tables) if found else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _by_rows(table: np.ndarray) -> Codes:
    """Every row rounded to the nearest of 255 steps."""
    largest = np.abs(table).max(1, keepdims=True) / 127
    step = np.where(largest > 0, largest, 1.0).astype(np.float32)
    codes = (np.rint(table / step) + 128).astype(np.uint8)
    return Codes(8, table.shape[1], codes, step, np.full_like(step, 128))


def _rows(graph: Any, there: dict[str, Any], node: Any, name: str, tables: dict[str, np.ndarray]) -> list[Any]:
    """s (u - z) of the rows that a `Gather` takes: (..., blocks, block), as the matrix is stored, and then (..., inputs)."""
    from onnx import TensorProto, helper, numpy_helper

    (ids, out), width = (node.input[1], node.output[0]), tables[node.input[0]].shape[1]
    blocks, zeros = there[f"{name}_Q8"].dims, f"{name}_zero_points"

    def constant(end: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value), f"{out}_{end}"))
        return f"{out}_{end}"

    last = constant("last", [-1])

    def floats(what: str, end: str) -> list[Any]:
        """Of one number for every block."""
        return [
            helper.make_node("Gather", [what, ids], [f"{out}_{end}_taken"]),
            helper.make_node("Cast", [f"{out}_{end}_taken"], [f"{out}_{end}_float"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", [f"{out}_{end}_float", last], [f"{out}_{end}"]),
        ]

    middle = [] if zeros in there else [constant("zero", np.float32(128))]
    nodes = [] if middle else floats(zeros, "zero")
    nodes += [
        *floats(f"{name}_scales", "scale"),
        helper.make_node("Gather", [f"{name}_Q8", ids], [f"{out}_taken"]),
        helper.make_node("Cast", [f"{out}_taken"], [f"{out}_codes"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [f"{out}_codes", f"{out}_zero"], [f"{out}_steps"]),
        helper.make_node("Mul", [f"{out}_steps", f"{out}_scale"], [f"{out}_blocks"]),
        helper.make_node("Shape", [ids], [f"{out}_of"]),
        helper.make_node("Concat", [f"{out}_of", last], [f"{out}_shape"], axis=0),
    ]
    if blocks[1] * blocks[2] == width:
        return [*nodes, helper.make_node("Reshape", [f"{out}_blocks", f"{out}_shape"], [out])]
    ends = [constant("start", [0]), constant("end", [width]), last]
    return [
        *nodes,
        helper.make_node("Reshape", [f"{out}_blocks", f"{out}_shape"], [f"{out}_filled"]),
        helper.make_node("Slice", [f"{out}_filled", *ends], [out]),
    ]
