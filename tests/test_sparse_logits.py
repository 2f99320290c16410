"""Thinned-out teacher answers: an unbiased estimate, small on disk, equal to what is computed again, mended when damaged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lessons import VOCABULARY, of_kind
from scipy.stats import chisquare, norm

from multum.core import sparse_logits as module
from multum.core import teacher as teacher_module
from multum.core.model import Model
from multum.core.sparse_logits import (
    CachedSparseLogits,
    SparseLogits,
    Thinning,
    cached_sparse_logits,
    drawn,
    most_probable,
    sparse_logits,
    thinning_of,
)
from multum.errors import InputError
from multum.steps._outputs import softened_kl, sparse_cross_entropy

ERROR_RATE = 1e-4
"""How often a right estimator would fail each statistical test below, over seeds; the seeds are fixed."""
ROWS = 12
DEFAULT = Thinning()


class Ids:
    pad_token_id = 0
    backend_tokenizer = property(lambda self: self)

    def to_str(self) -> str:
        return "{}"


def a_teacher(vocabulary: int = VOCABULARY) -> Model:
    return Model(module=of_kind("causal_lm", vocabulary=vocabulary)[0].eval(), tokenizer=Ids(), source="test")


@pytest.fixture
def teacher() -> Model:
    return a_teacher()


def texts(count: int = ROWS) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    return [{"input_ids": draw.integers(2, VOCABULARY, 2 + i % 5).tolist()} for i in range(count)]


def everywhere(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [list(range(len(row["input_ids"]) - 1)) for row in rows]


def live(teacher: Model, row: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return teacher.module(torch.tensor([row["input_ids"]])).logits[0]


def dense(values: np.ndarray, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Stored entries as distributions, (places, vocabulary)."""
    result = np.zeros((len(values), vocabulary))
    for place, entries in enumerate(values):
        for entry in entries:
            result[place, entry["id"]] += float(entry["weight"])
    return result / result.sum(1, keepdims=True)


# The estimate


def test_tokens_are_drawn_by_the_inverse_of_the_distribution_function() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=draw) * 2
    logits[:, 3] = -torch.inf  # is never drawn
    uniform = torch.rand(6, 20, generator=draw, dtype=torch.float64)
    uniform[0, 0] = 0.0
    ids, counts = drawn(logits, uniform)
    for place in range(6):
        reached = np.cumsum(logits[place].double().softmax(-1).numpy())
        expected: dict[int, int] = {}
        for u in uniform[place].tolist():
            token = next(i for i, value in enumerate(reached) if value / reached[-1] > u)
            expected[token] = expected.get(token, 0) + 1
        found = {i: n for i, n in zip(ids[place].tolist(), counts[place].tolist(), strict=True) if n}
        assert found == expected
        assert list(found) == sorted(found)
        assert 3 not in found
    assert (counts.sum(-1) == 20).all()


def estimates(how: Thinning, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimates for one text over many draws, (times, places, vocabulary), and the teacher's p, (places, vocabulary)."""
    teacher, row = a_teacher(), texts()[4]
    places = everywhere([row])[0]
    rows = [{**row, "places": places, "index": number} for number in range(times)]
    values = sparse_logits(teacher.module, rows, 0, VOCABULARY, how, precision="fp32")
    p = live(teacher, row)[places].double().softmax(-1).numpy()
    return dense(values).reshape(times, len(places), VOCABULARY), p


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of a chi-square test; tokens that are hardly expected are taken together."""
    rare = expected < np.sort(expected[expected >= 10])[1]  # with one that is not, so that they are enough together
    found, wanted = ([*x[~rare], x[rare].sum()] for x in (counts, expected))
    return float(chisquare(found, wanted).pvalue)


@pytest.mark.parametrize(("how", "passes"), [(Thinning(20, seed=7), True), (Thinning(20, top_k=True), False)])
def test_what_is_drawn_is_distributed_as_the_teacher_says_and_the_most_probable_is_not(how: Thinning, passes: bool) -> None:
    times = 1500
    found, p = estimates(how, times)
    draws = times * how.tokens  # independent ones, so that their counts are multinomial if p is right
    for counts, probabilities in zip(found.sum(0) * how.tokens, p, strict=True):
        assert (p_value(counts, draws * probabilities) > ERROR_RATE) == passes


@pytest.mark.parametrize(("how", "passes"), [(Thinning(20, seed=8), True), (Thinning(20, top_k=True), False)])
def test_loss_and_gradient_are_on_average_those_of_the_whole_distribution(how: Thinning, passes: bool) -> None:
    times, place = 1000, 1
    found, p = estimates(how, times)
    z_t = torch.from_numpy(p[place]).log()
    z_s = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    everything = torch.arange(VOCABULARY).expand(times, -1)
    many = z_s.expand(times, -1)
    losses = sparse_cross_entropy(many, SparseLogits(everything, torch.from_numpy(found[:, place]), VOCABULARY))
    (sparse,) = torch.autograd.grad(losses.mean(), z_s)
    whole = softened_kl(z_s, z_t, 1.0)
    (full,) = torch.autograd.grad(whole, z_s)

    spread = np.sqrt(p[place] * (1 - p[place]) / (times * how.tokens))  # of a multinomial's share
    common = p[place] > 1e-3  # where it is near to normal
    bound = norm.isf(ERROR_RATE / 2 / common.sum())
    z = ((sparse - full).numpy() / spread)[common]
    assert (np.abs(z).max() < bound) == passes
    entropy = -(p[place] * np.log(p[place])).sum()
    surprise = -z_s.detach().log_softmax(-1).numpy()
    deviation = np.sqrt((p[place] * surprise**2).sum() - (p[place] * surprise).sum() ** 2) / np.sqrt(times * how.tokens)
    apart = losses.mean().item() - (whole.item() + entropy)
    assert (abs(apart) < norm.isf(ERROR_RATE / 2) * deviation) == passes


def test_the_most_probable_are_torchs() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    ids, shares = most_probable(logits, 3)
    p = logits.softmax(-1)
    for place in range(4):
        best = sorted(range(9), key=lambda i: -p[place, i])[:3]
        assert ids[place].tolist() == best
        assert torch.allclose(shares[place], p[place, best] / p[place, best].sum())


def test_the_sparse_loss_by_hand_and_over_a_shared_vocabulary() -> None:
    z = torch.tensor([[1.0, 2.0, -1.0, 9.0]])  # the last one is padding of the student's
    t = SparseLogits(torch.tensor([[1, 2, 0]]), torch.tensor([[0.75, 0.25, 0.0]]), 3)
    log_q = z[0, :3].log_softmax(-1)
    assert sparse_cross_entropy(z, t).item() == pytest.approx(-(0.75 * log_q[1] + 0.25 * log_q[2]).item(), rel=1e-6)


# On disk


def kept(teacher: Model, rows: list[Any], folder: Path, how: Thinning = DEFAULT, **changes: Any) -> CachedSparseLogits:
    options = {"vocabulary": VOCABULARY, "how": how, "precision": "fp32", **changes}
    places = options.pop("places", everywhere(rows))
    return cached_sparse_logits(teacher, rows, places, folder, **options)


def test_what_is_kept_is_what_is_drawn_live(teacher: Model, tmp_path: Path) -> None:
    rows = texts()
    cached = kept(teacher, rows, tmp_path)
    assert not cached.values.flags.writeable
    start = 0
    for number, row in enumerate(rows):
        logits = live(teacher, row)[:-1]
        uniform = torch.from_numpy(np.random.default_rng([0, number]).random((len(logits), 50)))
        ids, counts = drawn(logits, uniform)
        part = cached.values[start : start + len(logits)]
        assert np.array_equal(part["id"], ids[:, :VOCABULARY])
        assert np.array_equal(part["weight"], counts[:, :VOCABULARY])
        assert (part["weight"].astype(int).sum(-1) == 50).all()
        start += len(logits)
    assert start == len(cached.values)


def test_of_examples_and_places_those_asked_for_come_back(teacher: Model, tmp_path: Path) -> None:
    rows = texts()
    cached = kept(teacher, rows, tmp_path)
    index = np.array([7, 0, 2])
    assert cached.count(index).tolist() == [len(rows[i]["input_ids"]) - 1 for i in index]
    wanted = np.arange(cached.count(index).sum()) % 2 == 0
    found = cached.take(index, wanted, torch.device("cpu"))
    places = [place for i in index for place in range(cached.ends[i] - cached.count(np.array([i]))[0], cached.ends[i])]
    expected = dense(cached.values[np.array(places)[wanted]])
    ours = torch.zeros(len(expected), VOCABULARY).scatter_add(-1, found.ids, found.weights)
    assert np.allclose(ours.numpy(), expected, atol=1e-6)
    assert torch.allclose(found.weights.sum(-1), torch.ones(len(expected)))
    assert len(cached.take(index, np.zeros_like(wanted), torch.device("cpu")).ids) == 0


@pytest.mark.parametrize(
    ("vocabulary", "top_k", "size"), [(1000, False, 150), (70_000, False, 250), (1000, True, 200), (70_000, True, 300)]
)
def test_a_token_takes_three_hundred_bytes_at_most(vocabulary: int, top_k: bool, size: int, tmp_path: Path) -> None:
    rows = texts(3)
    cached = kept(a_teacher(vocabulary), rows, tmp_path, Thinning(top_k=top_k), vocabulary=vocabulary)
    (path,) = tmp_path.glob("*.sparse")
    assert path.stat().st_size == cached.values.nbytes == size * sum(len(row["input_ids"]) - 1 for row in rows)
    assert cached.values["id"].max() > 255


def test_only_the_tokens_that_both_models_have_are_kept(tmp_path: Path) -> None:
    teacher, rows = a_teacher(VOCABULARY + 8), texts(4)
    cached = kept(teacher, rows, tmp_path, Thinning(VOCABULARY, top_k=True))
    p = live(teacher, rows[1])[:-1, :VOCABULARY].softmax(-1)
    first = cached.count(np.array([0]))[0]
    assert np.allclose(dense(cached.values[first : first + len(p)]), p, atol=1e-3)


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Rows of every call, which goes on working, or is interrupted after so many calls."""
    calls: list[int] = []

    def counted(where: Any, rows: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if stop_after is not None and len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return sparse_logits(where, rows, *args, **kwargs)

    monkeypatch.setattr(module, "sparse_logits", counted)
    return calls


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "CHUNK", 5)


@pytest.mark.usefixtures("small_chunks")
def test_a_second_call_computes_nothing_and_an_interrupted_one_goes_on(
    teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts()
    whole = np.array(kept(teacher, rows, tmp_path / "a").values)
    counting(monkeypatch, stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        kept(teacher, rows, tmp_path / "b")
    calls = counting(monkeypatch)
    assert np.array_equal(kept(teacher, rows, tmp_path / "b").values, whole)
    assert calls == [5, 2]
    assert np.array_equal(kept(teacher, rows, tmp_path / "b").values, whole)
    assert calls == [5, 2]


@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_chunk_is_found_and_computed_again(
    teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = texts()
    before = kept(teacher, rows, tmp_path)
    whole, at = np.array(before.values), int(before.ends[6]) * before.values[0].nbytes - 1
    (path,) = tmp_path.glob("*.sparse")
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40  # row 6, in the second chunk
    path.write_bytes(data)
    calls = counting(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(kept(teacher, rows, tmp_path).values, whole)
    assert calls == [5]
    assert "rows from 5 were damaged" in caplog.text


@pytest.mark.parametrize(
    "what", ["weights", "texts", "labels", "mask", "places", "tokens", "method", "seed", "vocabulary", "precision"]
)
def test_what_changes_the_answers_changes_the_key(what: str, teacher: Model, tmp_path: Path) -> None:
    rows, how, changes = texts(), Thinning(), {}
    kept(teacher, rows, tmp_path)
    if what == "weights":
        teacher.module.transformer.ln_f.bias.data[0] += 1e-3
    elif what == "places":
        changes = {"places": [[0]] * len(rows)}
    elif what in ("vocabulary", "precision"):
        changes = {what: VOCABULARY - 1 if what == "vocabulary" else "bf16"}
    elif what in ("labels", "mask"):
        name = "labels" if what == "labels" else "attention_mask"
        rows = [{**row, name: [1] * len(row["input_ids"])} for row in rows]
    elif what == "texts":
        rows = rows[1:] + rows[:1]
    else:
        how = {"tokens": Thinning(49), "method": Thinning(top_k=True), "seed": Thinning(seed=1)}[what]
    kept(teacher, rows, tmp_path, how, **changes)
    assert len(list(tmp_path.glob("*.sparse"))) == 2


def test_seeds_and_examples_draw_other_numbers(teacher: Model, tmp_path: Path) -> None:
    rows = [texts()[4]] * 2
    one, other = kept(teacher, rows, tmp_path).values, kept(teacher, rows, tmp_path, Thinning(seed=1)).values
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[: len(one) // 2], one[len(one) // 2 :])


def test_memory_is_bounded_and_does_not_matter(teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, sizes = texts(), []
    whole = np.array(kept(teacher, rows, tmp_path / "a").values)
    monkeypatch.setattr(module, "NUMBERS", 4 * VOCABULARY * 2)  # two places at a time
    monkeypatch.setattr(module, "drawn", lambda *given: [sizes.append(len(given[0])), drawn(*given)][1])
    assert np.array_equal(kept(teacher, rows, tmp_path / "b").values, whole)
    assert max(sizes) == 2


def test_what_does_not_fit_the_disk_is_refused(teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(teacher_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="the teacher's outputs would take"):
        kept(teacher, texts(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_nothing_to_keep_is_an_error(teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token of the training set has a label"):
        kept(teacher, texts(2), tmp_path, places=[[], []])


def test_settings_are_read() -> None:
    assert thinning_of(None) == Thinning(50)
    assert thinning_of({"sample": 12}) == Thinning(12)
    assert thinning_of({"top_k": 255}) == Thinning(255, top_k=True)


@pytest.mark.parametrize(
    "given",
    [{"sample": 0}, {"sample": 256}, {"top": 5}, {"sample": 5, "top_k": 5}, {}, 50, {"sample": 5.0}, {"top_k": True}],
    ids=str,
)
def test_other_settings_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"sparse_logits is \{'sample': K\} or \{'top_k': K\}, with K from 1 to 255"):
        thinning_of(given)
