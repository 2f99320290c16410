r"""Static 8 bits: the ranges of activations are taken from texts beforehand, in the place of finding them anew in every pass.

    s = (hi - lo) / 255        z = round(-lo / s)        q = clamp(round(x / s) + z, 0, 255)

    minmax        lo, hi    the least and the largest x
    percentile    lo, hi    with 0.005 % of all x below and above
    mse           lo, hi    with the least Σ (x - s (q - z))², one end searched after the other

over the histogram of each tensor that a matrix reads (collected by onnxruntime's calibration); 0 always lies between lo and hi.
Nothing else changes in a graph of 8-bit weights: fused operators stay fused, embeddings stay 8 bits. A pass is spared the search
for ranges, and an answer no longer depends on what else is in the batch; what the texts did not show is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import InputError
from ._traced import quiet

METHODS = ("minmax", "percentile", "mse")
PERCENTILE = 99.99
BINS = 4096
SHARES = np.geomspace(1.0, 0.02, 60)
"""Of the largest and of the least value, at which `mse` tries to cut."""
DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")
TOP = 255

Histogram = tuple[np.ndarray, np.ndarray, float, float]
"""Counts, edges of the bins, least and largest value."""


def static(graph: onnx.ModelProto, calibration: Sequence[Mapping[str, Any]], method: str) -> onnx.ModelProto:
    """The same graph with fixed ranges.

    Args:
        graph: of 8-bit weights, whose activations are quantized as they come.
        calibration: padded batches.
        method: one of `METHODS`.

    Raises:
        InputError: there are no texts, too few, or numbers in the model that are not finite.
    """
    from ..core.task import check_calibration

    if not calibration:
        raise InputError("ranges of activations are taken from texts, and there are no calibration texts")
    check_calibration(calibration, f"int8-{method}")
    names = list(dict.fromkeys(node.input[0] for node in graph.graph.node if node.op_type in DYNAMIC))
    found = histograms(graph, names, list(_rows(graph, calibration)))
    return _with_ranges(graph, {name: bounds(one, method) for name, one in found.items()})


def _rows(graph: onnx.ModelProto, calibration: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
    """Each text by itself, without padding: (1, tokens)."""
    wanted = [value.name for value in graph.graph.input]
    for batch in calibration:
        columns = {name: np.asarray(batch[name]) for name in wanted if name in batch}
        for row, mask in enumerate(np.asarray(batch["attention_mask"]).astype(bool)):
            one = {name: column[row][mask][None].astype(np.int64) for name, column in columns.items()}
            yield one | {name: np.zeros((1, int(mask.sum())), np.int64) for name in wanted if name not in one}


def histograms(graph: onnx.ModelProto, names: Sequence[str], rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Histogram]:
    """What flows through these tensors.

    Raises:
        InputError: as `static`.
    """
    import onnxruntime
    from onnxruntime.quantization.calibrate import HistogramCollector

    if not names:
        return {}
    seen = onnx.ModelProto()
    seen.CopyFrom(graph)
    seen.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(seen.SerializeToString(), options, providers=["CPUExecutionProvider"])
    collector = HistogramCollector("percentile", False, BINS, BINS, PERCENTILE, "same")
    with quiet():
        for row in rows:
            flowing = dict(zip(names, session.run(list(names), dict(row)), strict=True))
            for name, x in flowing.items():
                if not np.isfinite(x).all():
                    raise InputError(f"int8: what flows through {name} has numbers that are not finite")
            collector.collect(flowing)
    return {name: tuple(one[:4]) for name, one in collector.get_histogram_dict().items()}


def bounds(histogram: Histogram, method: str) -> tuple[float, float]:
    """lo and hi; 0 lies between them."""
    counts, edges, least, largest = histogram
    low, high = min(float(least), 0.0), max(float(largest), 0.0)
    if method == "percentile":
        share = np.cumsum(counts) / max(int(counts.sum()), 1)
        cut = (100 - PERCENTILE) / 200
        low = max(low, min(float(edges[np.searchsorted(share, cut)]), 0.0))
        return low, min(high, max(float(edges[np.searchsorted(share, 1 - cut) + 1]), 0.0))
    if method == "mse":
        high = min((share * high for share in SHARES), key=lambda each: squared_error(counts, edges, low, each))
        low = min((share * low for share in SHARES), key=lambda each: squared_error(counts, edges, each, high))
    return low, high


def grid(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """s and z."""
    scale = np.float32((high - low) / TOP) if high > low else np.float32(1.0)
    return scale, np.uint8(np.clip(np.round(-low / scale), 0, TOP))


def squared_error(counts: np.ndarray, edges: np.ndarray, low: float, high: float) -> float:
    """Σ (x - s (q - z))² with every x in the middle of its bin."""
    (scale, zero), x = grid(low, high), (edges[:-1] + edges[1:]) / 2
    q = np.clip(np.round(x / scale) + float(zero), 0, TOP)
    return float((counts * (x - scale * (q - float(zero))) ** 2).sum())


def _with_ranges(graph: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]]) -> onnx.ModelProto:
    new = onnx.ModelProto()
    new.CopyFrom(graph)
    del new.graph.node[:]
    made: dict[str, list[str]] = {}

    def quantized(x: str, outputs: Sequence[str]) -> list[str]:
        """x8, its scale and its zero point, under these names; a tensor that several matrices read is quantized once."""
        if x not in made:
            x8, scale, zero = made[x] = list(outputs)
            for name, value in zip((scale, zero), grid(*ranges[x]), strict=True):
                new.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
            new.graph.node.append(helper.make_node("QuantizeLinear", [x, scale, zero], [x8], name=x8))
        return made[x]

    for node in graph.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            for own, other in zip(node.output, quantized(node.input[0], node.output), strict=True):
                if own != other:  # another node has made it
                    new.graph.node.append(helper.make_node("Identity", [other], [own], name=own))
        elif node.op_type == "DynamicQuantizeMatMul":
            x, weight, weight_scale, *more = node.input
            weight_zero, bias = (*more, "", "")[:2]
            x8, scale, zero = quantized(x, [f"{x}.x8", f"{x}.x_scale", f"{x}.x_zero"])
            inputs = [x8, weight, scale, weight_scale, zero, weight_zero, bias]
            while not inputs[-1]:
                inputs.pop()
            new.graph.node.append(
                helper.make_node("MatMulIntegerToFloat", inputs, list(node.output), name=node.name, domain=node.domain)
            )
        else:
            new.graph.node.append(node)
    return new
