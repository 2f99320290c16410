"""Writes an encoder and its head as an ONNX graph of onnxruntime's fused operators.

A traced graph spends most of a small model's time between its many little nodes. Here a block is a dozen nodes, and:

- layer normalization as an instance normalization whose channels are the tokens: the same arithmetic, but onnxruntime's kernel for
  it is vectorized (18 µs instead of 48 µs for 26 tokens of width 384, where a whole small model takes 300 µs);
- 8-bit weights with a scale per output column, activations quantized as they come (one scale per tensor);
- 8-bit word embeddings with a scale per row, turned back after the look-up; positions in 16 bits, turned back when the graph is
  opened (of MiniLM's the first has an entry a hundred times the mean, which 8 bits with a scale per row do not stand);
- a classifier reads the first token only. So in the last block that attends the keys and values are those of all tokens, but
  the query, and everything after it, is computed for the first token alone. That is exact, not an approximation. Heads for tags
  and for spans read every token, and so does everything before them.
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ._encoder import Encoder, EncoderBlock, Linear, Norm

FUSED = "com.microsoft"


def write(encoder: Encoder, *, precision: str, pairs: bool = False) -> onnx.ModelProto:
    """The graph: `input_ids`, `attention_mask` (and `token_type_ids`), (batch, tokens) int64 -> the encoder's `outputs`.

    Args:
        encoder: weights and shapes.
        precision: `fp32` or `int8`.
        pairs: give the graph a `token_type_ids` input even where the model does not tell token types apart.
    """
    return _Writer(encoder, int8=precision == "int8", pairs=pairs).model()


class _Options(TypedDict):
    domain: str
    num_heads: int


class _Writer:
    def __init__(self, encoder: Encoder, *, int8: bool, pairs: bool) -> None:
        self.encoder, self.int8 = encoder, int8
        self.inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if pairs and encoder.types is not None else [])]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.first_only = False
        """From here on there is one token."""

    def model(self) -> onnx.ModelProto:
        blocks = self.encoder.blocks
        every = self.encoder.every_token
        last = max((i for i, block in enumerate(blocks) if block.heads), default=-1)
        x = self.embeddings()
        if last >= 0:
            self.node("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
        elif not every:
            x = self.first_token(x)
        for number, block in enumerate(blocks):
            x = self.attention(x, block, f"block{number}.attention", last=number == last and not every)
            x = self.feed_forward(x, block, f"block{number}.feed_forward")
        results = self.head_of_every(x) if every else self.head(x)
        shape = ["batch", "tokens"]
        graph = helper.make_graph(
            self.nodes,
            "multum",
            [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in self.inputs],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in results.items()],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(FUSED, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="multum")

    # -- parts ---------------------------------------------------------------------------------------------------------------

    def embeddings(self) -> str:
        e = self.encoder
        words = self.look_up(e.words)
        tokens = self.node("Shape", ["input_ids"], "tokens", start=1, end=2)
        ends = [self.constant("zero", np.array([0])), tokens, self.constant("zero", np.array([0]))]
        position = self.node("Slice", [self.positions(), *ends], "position")
        if "token_type_ids" in self.inputs and e.types is not None:
            types = self.node("Gather", [self.constant("types", e.types), "token_type_ids"], "type")
            words = self.node("Add", [words, types], "typed")
        x = self.add_norm(words, position, e.embeddings_norm, "embeddings")
        return self.linear(x, e.projection, "projection") if e.projection else x

    def positions(self) -> str:
        """All of them. onnxruntime computes what depends on no input once, when it opens the graph."""
        if not self.int8:
            return self.constant("positions", self.encoder.positions)
        halves = self.constant("positions", self.encoder.positions.astype(np.float16))
        return self.node("Cast", [halves], "positions32", to=TensorProto.FLOAT)

    def look_up(self, table: np.ndarray) -> str:
        if not self.int8:
            return self.node("Gather", [self.constant("words", table), "input_ids"], "word")
        values, scales = quantize(table.T)
        found = self.node("Gather", [self.constant("words", np.ascontiguousarray(values.T)), "input_ids"], "word8")
        scale = self.node("Gather", [self.constant("words.scale", scales[:, None]), "input_ids"], "word.scale")
        return self.node("Mul", [self.node("Cast", [found], "word32", to=TensorProto.FLOAT), scale], "word")

    def attention(self, x: str, block: EncoderBlock, name: str, *, last: bool) -> str:
        if not block.heads:
            return self.bias_norm(x, block.attention_output.bias, block.attention_norm, name)
        if last:
            context, x = self.attend_first(x, block, name), self.first_token(x)
        else:
            context = self.attend_all(x, block, name)
        return self.linear_add_norm(context, block.attention_output, x, block.attention_norm, name)

    def attend_all(self, x: str, block: EncoderBlock, name: str) -> str:
        joined = _side_by_side(block.query, block.key, block.value)
        width = joined.weight.shape[1] // 3
        output, options = f"{name}.context", _Options(domain=FUSED, num_heads=block.heads)
        bias = self.constant(f"{name}.qkv.bias", joined.bias)
        if not self.int8:
            weight = self.constant(f"{name}.qkv", joined.weight)
            return self.node("Attention", [x, weight, bias, "mask"], output, qkv_hidden_sizes=[width] * 3, **options)
        weight, scale, zero = self.quantized(f"{name}.qkv", joined.weight)
        x8, x_scale, x_zero = (f"{name}.x8", f"{name}.x_scale", f"{name}.x_zero")
        self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], [x8, x_scale, x_zero]))
        return self.node("QAttention", [x8, weight, bias, x_scale, scale, "mask", x_zero, zero], output, **options)

    def attend_first(self, x: str, block: EncoderBlock, name: str) -> str:
        assert block.query is not None  # noqa: S101 - the caller looked at `heads`
        query = self.linear(self.first_token(x), block.query, f"{name}.query")
        both = self.linear(x, _side_by_side(block.key, block.value), f"{name}.key_value")
        width = block.query.weight.shape[1]
        key, value = f"{name}.key", f"{name}.value"
        sizes = self.constant(f"{name}.sizes", np.array([width, width]))
        self.nodes.append(helper.make_node("Split", [both, sizes], [key, value], axis=-1))
        inputs = [query, key, value, "", "mask"]
        return self.node("MultiHeadAttention", inputs, f"{name}.context", domain=FUSED, num_heads=block.heads)

    def feed_forward(self, x: str, block: EncoderBlock, name: str) -> str:
        if block.up is None:
            return self.bias_norm(x, block.down.bias, block.feed_forward_norm, name)
        up = self.activation(x, block.up, self.encoder.activation, name)
        return self.linear_add_norm(up, block.down, x, block.feed_forward_norm, name)

    def head(self, x: str) -> dict[str, list[Any]]:
        """Of the first token. Returns the names and sizes of what comes out."""
        e = self.encoder
        x = self.node("Squeeze", [x, self.constant("one", np.array([1]))], "first")
        if e.head_dense:
            x = self.activation(x, e.head_dense, e.head_activation, "pooled")
        weight, bias = self.constant("head.weight", e.head_output.weight), self.constant("head.bias", e.head_output.bias)
        self.node("Gemm", [x, weight, bias], "logits")
        return {"logits": ["batch", len(e.head_output.bias)]}

    def head_of_every(self, x: str) -> dict[str, list[Any]]:
        """Of every token: all columns together, or each by itself."""
        last, names = self.encoder.head_output, self.encoder.outputs
        product = self.node("MatMul", [x, self.constant("head.weight", last.weight)], "head.product")
        logits = self.node("Add", [product, self.constant("head.bias", last.bias)], "logits" if len(names) == 1 else "head.sum")
        if len(names) == 1:
            return {logits: ["batch", "tokens", len(last.bias)]}
        columns = [f"{name}.column" for name in names]
        sizes = self.constant("head.sizes", np.ones(len(names), np.int64))
        self.nodes.append(helper.make_node("Split", [logits, sizes], columns, axis=-1))
        for name, column in zip(names, columns, strict=True):
            self.node("Squeeze", [column, self.constant("last.axis", np.array([-1]))], name)
        return {name: ["batch", "tokens"] for name in names}

    # -- operators -----------------------------------------------------------------------------------------------------------

    def first_token(self, x: str) -> str:
        """(batch, tokens, width) -> (batch, 1, width), once per tensor."""
        name, self.first_only = f"{x}.first", True
        if not any(name in node.output for node in self.nodes):
            self.node("Gather", [x, self.constant("index0", np.array([0]))], name, axis=1)
        return name

    def linear(self, x: str, linear: Linear, name: str) -> str:
        bias = self.constant(f"{name}.bias", linear.bias)
        if self.int8:
            return self.node("DynamicQuantizeMatMul", [x, *self.quantized(name, linear.weight), bias], name, domain=FUSED)
        return self.node("Add", [self.product(x, linear, name), bias], name)

    def product(self, x: str, linear: Linear, name: str) -> str:
        """x W without the bias."""
        if self.int8:
            return self.node("DynamicQuantizeMatMul", [x, *self.quantized(name, linear.weight)], f"{name}.product", domain=FUSED)
        return self.node("MatMul", [x, self.constant(f"{name}.weight", linear.weight)], f"{name}.product")

    def activation(self, x: str, linear: Linear, kind: str, name: str) -> str:
        bias = self.constant(f"{name}.up.bias", linear.bias)
        fused = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}.get(kind)
        product = self.product(x, linear, f"{name}.up")
        if fused:
            return self.node(fused, [product, bias], f"{name}.active", domain=FUSED)
        return self.node(
            {"relu": "Relu", "tanh": "Tanh"}[kind], [self.node("Add", [product, bias], f"{name}.up")], f"{name}.active"
        )

    def linear_add_norm(self, x: str, linear: Linear, residual: str, norm: Norm, name: str) -> str:
        return self.add_norm(self.linear(x, linear, f"{name}.out"), residual, norm, name)

    def add_norm(self, x: str, residual: str, norm: Norm, name: str) -> str:
        return self.norm(self.node("Add", [x, residual], f"{name}.sum"), norm, name)

    def bias_norm(self, x: str, bias: np.ndarray, norm: Norm, name: str) -> str:
        """What a removed sublayer leaves: its bias and its norm."""
        return self.norm(
            self.node("Add", [x, self.constant(f"{name}.left.bias", bias)], f"{name}.left") if bias.any() else x, norm, name
        )

    def norm(self, x: str, norm: Norm, name: str) -> str:
        unit = self.unit_scale(1 if self.first_only else None)
        plain = self.node("InstanceNormalization", [x, *unit], f"{name}.plain", epsilon=norm.epsilon)
        scaled = self.node("Mul", [plain, self.constant(f"{name}.gamma", norm.gamma)], f"{name}.scaled")
        if not norm.beta.any():
            return scaled
        return self.node("Add", [scaled, self.constant(f"{name}.beta", norm.beta)], f"{name}.norm")

    def unit_scale(self, tokens: int | None) -> list[str]:
        """A scale of one and a shift of zero for every token; None for as many as the text has."""
        values = {
            "ones": np.ones(len(self.encoder.positions), np.float32),
            "zeros": np.zeros(len(self.encoder.positions), np.float32),
        }
        if tokens is not None:
            return [self.constant(f"{name}{tokens}", value[:tokens]) for name, value in values.items()]
        zero = self.constant("zero", np.array([0]))
        names = [f"{name}.tokens" for name in values]
        for name, value in values.items():
            if not any(f"{name}.tokens" in node.output for node in self.nodes):
                self.node("Slice", [self.constant(name, value), zero, "tokens", zero], f"{name}.tokens")
        return names

    def quantized(self, name: str, weight: np.ndarray) -> list[str]:
        values, scales = quantize(weight)
        zeros = np.zeros(len(scales), np.int8)
        parts = (("weight", values), ("scale", scales), ("zero", zeros))
        return [self.constant(f"{name}.{part}", array) for part, array in parts]

    def constant(self, name: str, array: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def node(self, kind: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 8-bit rounding with a scale per column: W ≈ values * scales.

    Args:
        weight: (in, out).

    Returns:
        int8 (in, out), and float32 (out,).
    """
    scales = np.abs(weight).max(0, initial=0.0) / 127
    scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
    return np.round(weight / scales).astype(np.int8), scales


def _side_by_side(*linears: Linear | None) -> Linear:
    there = [linear for linear in linears if linear is not None]
    weights, biases = [linear.weight for linear in there], [linear.bias for linear in there]
    return Linear(np.concatenate(weights, 1), np.concatenate(biases))
