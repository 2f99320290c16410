r"""From which words does attention lead to what the head reads? Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928).

    Ā_l = ½ I + ½ mean over heads of A_l,  rows normalized to 1
    R = Ā_L ··· Ā_2 Ā_1          r = Σ_i p_i R_i

A_l are the attention probabilities of block l, (heads, tokens, tokens), and I is the residual connection. R_ij says how much of
what stands at token i at the end came from token j; p is how much the head reads of each token, for BERT the first alone. A block
whose attention was pruned away moves nothing between tokens: Ā = I.

It is for a look. Rollout knows nothing of values, of feed-forward layers or of classes, so that it says where a model could have
looked and not what for. How far it agrees with the gradients stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mixed(attention: np.ndarray) -> np.ndarray:
    """Ā of one block's attention probabilities, (heads, tokens, tokens) -> (tokens, tokens)."""
    both = 0.5 * attention.mean(axis=0) + 0.5 * np.eye(attention.shape[-1])
    return np.asarray(both / both.sum(axis=-1, keepdims=True))


def rollout(blocks: Sequence[np.ndarray | None], read: np.ndarray) -> np.ndarray:
    """How much of what the head reads came from every token, (tokens,); sums to 1 if `read` does.

    Args:
        blocks: attention probabilities from the first block to the last, (heads, tokens, tokens); None for a block without any.
        read: how much the head reads of every token at the end, (tokens,).
    """
    flow = np.asarray(read, dtype=np.float64)
    for attention in reversed(blocks):  # p (Ā_L ··· Ā_1) from the left: vectors times matrices
        flow = flow if attention is None else flow @ mixed(attention)
    return flow
