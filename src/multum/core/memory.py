"""Memory that is no longer used goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Collect what only refers to itself and, with glibc, hand freed pages back.

    A Trainer and its parts hold each other, and with them twice the weights. Batches of many shapes leave holes behind that glibc
    keeps: without this a process that trains several models grows by some hundred megabytes with each.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Hand freed pages back, with glibc; a few hundredths of a second."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if malloc_trim is not None:
            malloc_trim(0)
