"""Tests see no network, no cache of the user's, and one thread: what they compute must not depend on any of them.

`test_real.py` alone fetches packages through pip.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

CACHE = tempfile.TemporaryDirectory(prefix="multum-tests-")
os.environ.update({"HF_HUB_OFFLINE": "1", "MULTUM_CACHE": CACHE.name, "HF_DATASETS_CACHE": f"{CACHE.name}/datasets"})
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small are not made faster by threads, and a busy machine makes them wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("llama_cpp") is None:
        for item in items:
            if item.get_closest_marker("llamacpp"):
                item.add_marker(pytest.mark.skip(reason="llama-cpp-python is not installed (extra llamacpp)"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not run is said, whatever the verbosity."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    for reason in sorted(set(reasons)):
        terminalreporter.write_line(f"{reasons.count(reason)} tests not run: {reason.removeprefix('Skipped: ')}")
