"""What layer losses learn beside a student, in a checkpoint: going on from it needs that, and the student does not."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from .steps._layers import LayerMatcher

PROJECTIONS = "layer_projections.safetensors"


def save_projections(matcher: LayerMatcher | None, checkpoint: str) -> None:
    """Write them into a checkpoint's folder, if there are any."""
    if matcher and (state := matcher.state_dict()):
        save_file(state, Path(checkpoint) / PROJECTIONS)


def load_projections(matcher: LayerMatcher | None, checkpoint: str | None) -> None:
    """Read them from there, if there are any."""
    if matcher and checkpoint and (path := Path(checkpoint) / PROJECTIONS).is_file():
        matcher.load_state_dict(load_file(path))
