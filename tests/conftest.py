"""Tests see no network, no cache of the user's, and one thread: what they compute must not depend on any of them."""

from __future__ import annotations

import os
import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="multum-tests-")
os.environ.update({"HF_HUB_OFFLINE": "1", "MULTUM_CACHE": CACHE.name, "HF_DATASETS_CACHE": f"{CACHE.name}/datasets"})
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
