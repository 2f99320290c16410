"""The teacher cache: equal to live outputs, used when valid, mended when not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from multum.core import teacher as module
from multum.core.teacher import cached_logits, logits, model_inputs

ROWS = 40


@pytest.fixture
def teacher() -> Any:
    return tiny.model(seed=5)


@pytest.fixture
def rows(teacher: Any) -> list[Any]:
    return list(tiny.task(n_train=ROWS).encode(teacher, "train"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)


def one_by_one(teacher: Any, rows: list[Any]) -> np.ndarray:
    with torch.no_grad():
        return torch.cat(
            [teacher.module(**{name: torch.tensor([value]) for name, value in model_inputs(row).items()}).logits for row in rows]
        ).numpy()


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Rows of every call of `logits`, which goes on working, or is interrupted after so many calls."""
    calls: list[int] = []

    def counted(where: Any, rows: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return logits(where, rows, *args, **kwargs)

    monkeypatch.setattr(module, "logits", counted)
    return calls


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_and_order_do_not_change_outputs(family: str) -> None:
    model = tiny.model(family)
    rows = list(tiny.task(n_train=ROWS).encode(model, "train"))
    batched = logits(model.module, rows, model.tokenizer.pad_token_id, batch_size=7, precision="fp32")
    assert np.allclose(batched, one_by_one(model, rows), atol=1e-5)


def test_cached_equals_live(teacher: Any, rows: list[Any], tmp_path: Path) -> None:
    cached = cached_logits(teacher, rows, tmp_path, precision="fp32")
    assert cached.shape == (ROWS, 2)
    assert not cached.flags.writeable
    assert np.allclose(cached, one_by_one(teacher, rows), atol=1e-5)


def test_a_second_call_computes_nothing(teacher: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = np.array(cached_logits(teacher, rows, tmp_path))
    calls = counting(monkeypatch)
    assert np.array_equal(cached_logits(teacher, rows, tmp_path), first)
    assert calls == []


@pytest.mark.parametrize("what", ["weights", "tokenizer", "texts", "precision"])
def test_what_changes_the_outputs_changes_the_key(what: str, teacher: Any, rows: list[Any], tmp_path: Path) -> None:
    cached_logits(teacher, rows, tmp_path, precision="fp32")
    other = teacher.copy()
    if what == "weights":
        other.module.classifier.bias.data[0] += 1e-3
    elif what == "tokenizer":
        other.tokenizer.add_tokens(["zebra"])
    elif what == "texts":
        rows = rows[:-1] + rows[:1]
    cached_logits(other, rows, tmp_path, precision="bf16" if what == "precision" else "fp32")
    assert len(list(tmp_path.glob("*.f32"))) == 2


def test_an_interrupted_run_goes_on_where_it_stopped(
    teacher: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(monkeypatch, stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        cached_logits(teacher, rows, tmp_path, precision="fp32")
    calls = counting(monkeypatch)
    cached = cached_logits(teacher, rows, tmp_path, precision="fp32")
    assert calls == [16, 8]
    assert np.allclose(cached, one_by_one(teacher, rows), atol=1e-5)


def test_a_damaged_chunk_is_found_and_computed_again(
    teacher: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = np.array(cached_logits(teacher, rows, tmp_path))
    (path,) = tmp_path.glob("*.f32")
    data = bytearray(path.read_bytes())
    data[20 * 2 * 4] ^= 0x40  # row 20, in the second chunk
    path.write_bytes(data)
    calls = counting(monkeypatch)
    with caplog.at_level(logging.WARNING):
        after = cached_logits(teacher, rows, tmp_path)
    assert calls == [16]
    assert np.array_equal(after, before)
    assert "rows from 16 were damaged" in caplog.text


@pytest.mark.parametrize("damage", ["shorter", "index gone", "index damaged", "index of another kind"])
def test_a_damaged_cache_is_rebuilt(damage: str, teacher: Any, rows: list[Any], tmp_path: Path) -> None:
    before = np.array(cached_logits(teacher, rows, tmp_path))
    (path,), (index,) = tmp_path.glob("*.f32"), tmp_path.glob("*.json")
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "index gone":
        index.unlink()
    else:
        index.write_text("{" if damage == "index damaged" else "[1]", encoding="utf-8")
    assert np.array_equal(cached_logits(teacher, rows, tmp_path), before)


def test_no_rows_is_an_error(teacher: Any) -> None:
    with pytest.raises(ValueError, match="no rows"):
        logits(teacher.module, [], 0)
