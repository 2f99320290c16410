"""Betas of norms, moved into the biases that meet them next: the graph gets smaller, its answers stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import tiny

from multum.runtimes import _encoder, _encoder_graph
from multum.runtimes._encoder import Encoder, Norm


def answers(encoder: Encoder, *, pairs: bool = False) -> tuple[np.ndarray, list[str]]:
    """Logits of two padded texts, and the names of the graph's nodes."""
    graph = _encoder_graph.write(encoder, precision="fp32", pairs=pairs)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(5, len(encoder.words), (2, 9))
    columns = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    columns["attention_mask"][1, 6:], columns["token_type_ids"][:, 5:] = 0, 1
    wanted = {value.name for value in graph.graph.input}
    logits = session.run(None, {name: column for name, column in columns.items() if name in wanted})[0]
    return logits, [node.name for node in graph.graph.node]


def norms(encoder: Encoder) -> list[Norm]:
    return [
        encoder.embeddings_norm,
        *(norm for block in encoder.blocks for norm in (block.attention_norm, block.feed_forward_norm)),
    ]


def assert_folding_changes_nothing(encoder: Encoder, *, pairs: bool = False) -> None:
    folded = _encoder.fold_betas(encoder)
    assert all(norm.beta.any() for norm in norms(encoder))
    assert not any(norm.beta.any() for norm in norms(folded))
    before, nodes = answers(encoder, pairs=pairs)
    after, fewer = answers(folded, pairs=pairs)
    np.testing.assert_allclose(after, before, atol=1e-5, rtol=1e-5)
    assert np.ptp(before) > 1e-3
    assert len(nodes) - len(fewer) == len(norms(encoder))
    assert not any(name.endswith(".norm") for name in fewer)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folding_changes_no_answer(family: str, whole: bool) -> None:
    model = tiny.model(family, layers=3)
    encoder = _encoder.read((model if whole else tiny.uneven(model)).module, max_length=64, pairs=True)
    assert_folding_changes_nothing(encoder, pairs=True)


def test_folding_where_nothing_attends_or_the_head_has_one_layer() -> None:
    drawn = _encoder.draw(32, 8, [(2, 16), (1, 8)])
    shift = np.linspace(-1, 1, 32, dtype=np.float32)

    def shifted(norm: Norm) -> Norm:
        return replace(norm, beta=shift)

    blocks = [
        replace(block, attention_norm=shifted(block.attention_norm), feed_forward_norm=shifted(block.feed_forward_norm))
        for block in drawn.blocks
    ]
    encoder = replace(drawn, embeddings_norm=shifted(drawn.embeddings_norm), blocks=blocks, head_dense=None)
    assert_folding_changes_nothing(encoder)
    assert_folding_changes_nothing(replace(encoder, blocks=[]))
    nothing = [replace(block, heads=0, query=None, key=None, value=None, up=None) for block in blocks]
    assert_folding_changes_nothing(replace(encoder, blocks=nothing, head_dense=drawn.head_dense))
