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
from multum.core import teacher_states
from multum.core.capture import Captured, Wanted, capture
from multum.core.model import Model
from multum.core.reporting import listening
from multum.core.teacher import cached_logits, key_of, logits, model_inputs
from multum.core.teacher_states import CachedStates, cached_states, states
from multum.core.training import pad
from multum.errors import InputError, MultumError

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


@pytest.mark.parametrize("what", ["weights", "tokenizer", "texts", "precision", "token types", "padding", "dtype", "heads"])
def test_what_changes_the_outputs_changes_the_key(what: str, teacher: Any, rows: list[Any], tmp_path: Path) -> None:
    cached_logits(teacher, rows, tmp_path, precision="fp32")
    other = teacher.copy()
    if what == "weights":
        other.module.classifier.bias.data[0] += 1e-3
    elif what == "tokenizer":
        other.tokenizer.add_tokens(["zebra"])
    elif what == "heads":  # the same weights, cut in other places
        other.module.config.num_attention_heads //= 2
    elif what == "texts":
        rows = rows[:-1] + rows[:1]
    elif what == "token types":
        rows = [{**row, "token_type_ids": [i % 2 for i in range(len(row["input_ids"]))]} for row in rows]
    elif what == "padding":
        rows = [{**row, "attention_mask": [1] * (len(row["input_ids"]) - 1) + [0]} for row in rows]
    elif what == "dtype":
        other.module.bfloat16().float()
        cached_logits(other, rows, tmp_path, precision="fp32")  # weights that bf16 holds exactly
        assert len(list(tmp_path.glob("*.f32"))) == 2
        other.module.bfloat16()
    cached_logits(other, rows, tmp_path, precision="bf16" if what == "precision" else "fp32")
    assert len(list(tmp_path.glob("*.f32"))) == (3 if what == "dtype" else 2)


def test_the_key_outlives_a_folder_and_other_names(teacher: Any, rows: list[Any], tmp_path: Path) -> None:
    teacher.copy().save(tmp_path / "model")
    again = Model.load(tmp_path / "model", auto_class="AutoModelForSequenceClassification")
    again.module.config.id2label = {0: "bad", 1: "good"}
    assert key_of(again, rows, "fp32") == key_of(teacher, rows, "fp32")


def test_two_processes_at_once_take_nothing_from_each_other(
    teacher: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes after this one has looked and before it begins."""
    make_room, others = module._make_room, []

    def meanwhile(*args: Any) -> None:
        make_room(*args)
        if not others:
            others.append(None)
            others[0] = cached_logits(teacher, rows, tmp_path, precision="fp32")

    monkeypatch.setattr(module, "_make_room", meanwhile)
    compute = module.logits

    def looking(*args: Any, **kwargs: Any) -> Any:
        assert others[0] is None or np.array(others[0]).any(axis=1).all()
        return compute(*args, **kwargs)

    monkeypatch.setattr(module, "logits", looking)
    mine = cached_logits(teacher, rows, tmp_path, precision="fp32")
    assert np.array_equal(mine, others[0])


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


def test_a_folder_in_the_place_of_the_file_is_an_error(teacher: Any, rows: list[Any], tmp_path: Path) -> None:
    place = tmp_path / f"{key_of(teacher, rows, 'fp32')}.f32"
    place.mkdir()
    with pytest.raises(InputError, match=rf"{place.name} is a folder where a file"):
        cached_logits(teacher, rows, tmp_path, precision="fp32")


def test_no_rows_is_an_error(teacher: Any) -> None:
    with pytest.raises(ValueError, match="no rows"):
        logits(teacher.module, [], 0)


# The inside of a teacher

WANTED = Wanted(hidden=(0, 2), attention=(1, 2))
WIDTH = 2 * 32 + 2 * 3 * 32


def inside(teacher: Any, rows: list[Any]) -> Captured:
    """Live, all rows in one batch."""
    with torch.no_grad(), capture(teacher.module) as captured:
        teacher.module(**pad([model_inputs(row) for row in rows], 0))
    return captured


def kept(teacher: Any, rows: list[Any], folder: Path, wanted: Wanted = WANTED) -> CachedStates:
    return cached_states(teacher, rows, wanted, folder, precision="fp32")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_states_equal_live_ones(family: str, tmp_path: Path) -> None:
    teacher = tiny.model(family, seed=5)
    rows = list(tiny.task(n_train=ROWS).encode(teacher, "train"))
    cached = kept(teacher, rows, tmp_path)
    assert cached.values.shape == (sum(len(row["input_ids"]) for row in rows), WIDTH)
    assert cached.values.dtype == np.float16
    assert not cached.values.flags.writeable
    chosen = [31, 0, 7, 39]
    part = [rows[i] for i in chosen]
    live, tokens = inside(teacher, part), max(len(row["input_ids"]) for row in part)
    found = cached.batch(torch.tensor(chosen), tokens)
    assert (sorted(found.hidden), sorted(found.attention)) == ([0, 2], [1, 2])
    for place, row in enumerate(part):
        length = len(row["input_ids"])
        for layer, state in found.hidden.items():
            assert torch.allclose(state[place, :length], live.hidden[layer][place, :length], rtol=1e-3, atol=1e-3)
            assert not state[place, length:].any()
        for layer, attention in found.attention.items():
            expected = live.attention[layer]
            assert (attention.scaling, attention.causal) == (expected.scaling, expected.causal)
            for name in ("query", "key", "value"):
                ours, theirs = getattr(attention, name), getattr(expected, name)
                assert ours.shape == theirs.shape
                assert torch.allclose(ours[place, :, :length], theirs[place, :, :length], rtol=2e-3, atol=1e-2)


def test_states_are_used_again_and_mended_like_logits(
    teacher: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def counted(where: Any, part: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(len(part))
        return states(where, part, *args, **kwargs)

    monkeypatch.setattr(teacher_states, "states", counted)
    stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        kept(teacher, rows, tmp_path)
    stop_after = 99
    first = np.array(kept(teacher, rows, tmp_path).values)
    assert calls == [16, 16, 8]
    assert np.array_equal(kept(teacher, rows, tmp_path).values, first)
    assert len(calls) == 3
    (path,) = tmp_path.glob("*.f16")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(kept(teacher, rows, tmp_path).values, first)
    assert calls[3:] == [16]
    assert "damaged" in caplog.text


@pytest.mark.parametrize("what", ["layers", "weights", "texts"])
def test_what_changes_the_states_changes_the_key(what: str, teacher: Any, rows: list[Any], tmp_path: Path) -> None:
    kept(teacher, rows, tmp_path)
    other = teacher.copy()
    if what == "weights":
        other.module.classifier.bias.data[0] += 1e-3
    elif what == "texts":
        rows = rows[:-1] + rows[:1]
    kept(other, rows, tmp_path, Wanted(hidden=(1, 2), attention=(1, 2)) if what == "layers" else WANTED)
    assert len(list(tmp_path.glob("*.f16"))) == 2


def test_a_cache_is_written_in_chunks_of_few_bytes(
    teacher: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.array(kept(teacher, rows, tmp_path / "a").values)
    monkeypatch.setattr(module, "CHUNK_BYTES", 40 * WIDTH * 2)
    assert np.array_equal(kept(teacher, rows, tmp_path / "b").values, whole)
    lengths = [len(row["input_ids"]) for row in rows]
    starts = module._starts(lengths, WIDTH * 2)
    assert len(starts) > 5
    for start, end in zip(starts, [*starts[1:], ROWS], strict=True):
        assert sum(lengths[start:end]) <= 40
        assert end - start <= 16
    assert module._starts([99, 1, 99], WIDTH * 2) == [0, 1, 2]


def test_what_would_not_fit_the_disk_is_refused_before_anything_is_written(
    teacher: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = sum(len(row["input_ids"]) for row in rows) * WIDTH * 2
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    folder = tmp_path / "new" / "cache"
    with pytest.raises(InputError, match=r"would take \d+ MB in .*cache, which has \d+ MB free; keep fewer layers"):
        kept(teacher, rows, folder)
    assert not folder.parent.exists()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=size))
    remarks: list[str] = []
    monkeypatch.setattr(module, "WORTH_SAYING", size - 1)
    with caplog.at_level(logging.INFO), listening(lambda _: None, remarks.append):
        assert kept(teacher, rows, folder).values.nbytes == size
        assert cached_logits(teacher, rows, folder).nbytes < size
    assert f"take {size / 1e6:.1f} MB" in caplog.text
    assert [f"take {size / 1e6:.1f} MB" in line for line in remarks] == [True]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=0))
    kept(teacher, rows, folder)  # it is there already
    with pytest.raises(InputError, match="would take"):
        cached_logits(teacher, rows, tmp_path / "other")


def test_states_beyond_the_range_of_half_precision_are_an_error(teacher: Any, rows: list[Any], tmp_path: Path) -> None:
    teacher.module.bert.encoder.layer[0].attention.self.query.weight.data *= 1e6
    with pytest.raises(MultumError, match="range of float16"):
        kept(teacher, rows, tmp_path)


def test_no_rows_no_states(teacher: Any) -> None:
    with pytest.raises(ValueError, match="no rows"):
        states(teacher.module, [], 0, WANTED)
