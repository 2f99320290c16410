"""Long texts in windows of tokens, and what a tokenizer puts around a text. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` are read, of which those from `first` on are new."""

    start: int
    end: int
    first: int


def windows(tokens: int, size: int, stride: int) -> list[Window]:
    """Windows over so many tokens, `stride` apart, until one reaches the end.

    Args:
        tokens: at least 1.
        size: tokens in a window.
        stride: 1 to `size`; below it, every token but the first has one before it in its window.
    """
    found: list[Window] = []
    for start in range(0, tokens, stride):
        found.append(Window(start, min(start + size, tokens), found[-1].end if found else 0))
        if found[-1].end == tokens:
            break
    return found


def specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and behind every text by itself."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
