"""What a row of the table of architectures says (`families`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """Paths of one architecture. Those of a block are relative to the block, the others to the base model.

    A row describes one stack of blocks; that of an encoder-decoder is its encoder's and holds the decoder's row. Parts of a block
    that have the same path live in one matrix, their rows one part after the other, in the order in which they stand here: query,
    key, value; gate, up.
    """

    model_type: str
    """`config.model_type` in transformers."""
    blocks: str
    """The `ModuleList` of blocks."""
    decoder: Family | None = None
    """The second stack, where a model has two; this row is the encoder's then."""
    cross: Family | None = None
    """The same block with the paths of its second attention, whose keys and values read what the encoder wrote."""
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    gate: str | None = None
    """Third feed-forward matrix, (neurons, hidden), where the first is multiplied with an activated one."""
    up: str
    """First feed-forward matrix, (neurons, hidden)."""
    down: str
    """Second feed-forward matrix, (hidden, neurons)."""
    feed_forward_norm: str
    pre_norm: bool = False
    """Whether the norms stand before their sublayers, so that the residual stream itself is never normed."""
    last_norm: str | None = None
    """The norm behind the last block, relative to the base model, where norms stand before their sublayers; of the decoder where
    there is one."""
    head_matrices: tuple[str, ...] = ()
    """Further matrices with rows for every head, where a model has them (DeBERTa's positions)."""
    head_bias: str | None = None
    """The attention that is given a `position_bias` with one column for every head of the unpruned block (MPNet, T5)."""
    handed_on: tuple[tuple[int, int], ...] = ()
    """What beside the hidden state goes from block to block: (place in what one returns, place among the arguments of the next)."""
    query_heads: tuple[str, ...] = ()
    """Attributes in which attention code keeps its number of query heads. One of the config is given to the block alone."""
    query_features: tuple[str, ...] = ()
    """Attributes with the width of all queries together."""
    key_heads: tuple[str, ...] = ()
    """Attributes with the number of key (and value) heads."""
    tuples: int = 0
    """How many things a block returns in a tuple, the hidden state first; 0 where it returns that alone."""
    free_heads: bool = False
    """Whether a config can state the number of heads apart from their width, so that evenly pruned heads are stock."""
    neurons_field: str = "intermediate_size"
    """What the config calls the number of feed-forward neurons, of query heads, of blocks."""
    heads_field: str = "num_attention_heads"
    layers_field: str = "num_hidden_layers"
    word_embeddings: str | None = None
    """This and what follows is what a graph of an encoder is written from; None where that cannot be."""
    position_embeddings: str | None = None
    embeddings_norm: str | None = None
    token_type_embeddings: str | None = None
    embeddings_projection: str | None = None
    """The linear layer from a smaller embedding width to the hidden width, where there is one (ELECTRA)."""
    position_offset: int = 0
    """The position of a text's first token (RoBERTa counts from padding_idx + 1 = 2)."""
    head_dense: str | None = None
    """The classification head's hidden layer, relative to the whole model; it reads the first token."""
    head_norm: str | None = None
    """A norm between that layer and the output (ModernBERT)."""
    head_output: str = "classifier"
    head_activation: str = "tanh"
