"""Whether the Hugging Face Hub can be asked: found out in a moment, where its own client tries again and again for a minute."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

PATIENCE_S = 5.0


def loading(source: str | Path) -> dict[str, Any]:
    """What `from_pretrained` is told so that it does not wait for a Hub out of reach: to look among the files fetched before."""
    return {} if Path(source).exists() or reachable() else {"local_files_only": True}


def reachable() -> bool:
    """Whether something answers at the Hub's address. Through a proxy that cannot be told, and counts as yes."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=PATIENCE_S).close()
    except OSError:
        return False
    return True
