"""Wanda against loops and plain forward passes; what all steps share that prune single weights."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from multum.core.blocks import walk_blocks
from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.surgery import keep_blocks
from multum.errors import InputError
from multum.steps import _sparsity
from multum.steps._sparsity import compressed_bytes, lowest, lowest_of_rows
from multum.steps.sparsegpt import Sparsegpt
from multum.steps.wanda import Wanda, squares, wanda, wanda_scores

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)
STEPS = pytest.mark.parametrize("step", [Wanda, Sparsegpt])


def problem(rows: int = 6, inputs: int = 12, tokens: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (rows, inputs) and X (tokens, inputs) whose inputs differ in size."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=made) * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=made)]
    return torch.randn(rows, inputs, generator=made), x


def inside(model: Model) -> dict[str, nn.Linear]:
    parts = set(blocks_of(model.module).modules())
    return {name: linear for name, linear in model.linears().items() if linear in parts}


@torch.no_grad()
def inputs_of(model: Model, texts: list[dict[str, torch.Tensor]], parts: list[nn.Linear]) -> list[torch.Tensor]:
    """What flows into each part in plain forward passes over single texts without padding, (tokens, features) in double."""
    seen: dict[int, list[torch.Tensor]] = {id(part): [] for part in parts}
    handles = [part.register_forward_pre_hook(lambda module, args: seen[id(module)].append(args[0][0].double())) for part in parts]
    for text in texts:
        model.module(**text)
    for handle in handles:
        handle.remove()
    return [torch.cat(seen[id(part)]) for part in parts]


def single_texts(batches: Any) -> list[dict[str, torch.Tensor]]:
    return [
        {key: value[i : i + 1, : int(batch["attention_mask"][i].sum())] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]


def by_loops(weight: torch.Tensor, x: torch.Tensor, sparsity: float) -> list[set[int]]:
    """Per row the inputs whose weights go."""
    norms = [math.sqrt(sum(value * value for value in column)) for column in x.T.tolist()]
    rows = []
    for row in weight.tolist():
        scores = [abs(w) * norm for w, norm in zip(row, norms, strict=True)]
        count = min(round(sparsity * len(row)), len(row) - 1)
        rows.append(set(sorted(range(len(row)), key=lambda j: scores[j])[:count]))
    return rows


def test_scores_are_weight_times_norm() -> None:
    weight, x = problem()
    scores = wanda_scores(weight, squares(x).sqrt())
    for i in range(len(weight)):
        for j in range(weight.shape[1]):
            assert scores[i, j].item() == pytest.approx(abs(weight[i, j].item()) * x[:, j].norm().item(), rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_lowest_of_every_row_go_and_the_others_stay(sparsity: float, seed: int) -> None:
    weight, x = problem(seed=seed)
    pruned = wanda(weight, squares(x).sqrt(), sparsity)
    for row, before, gone in zip(pruned, weight, by_loops(weight, x, sparsity), strict=True):
        assert {j for j in range(len(row)) if row[j] == 0} == gone
        assert all(row[j] == before[j] for j in range(len(row)) if j not in gone)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (3, 6)])
def test_a_pattern_keeps_the_highest_scores_of_every_group(keep: int, of: int) -> None:
    weight, x = problem()
    pruned, scores = wanda(weight, x.norm(dim=0), 0.0, f"{keep}:{of}"), weight.abs() * x.norm(dim=0)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], of):
            kept = [j for j in range(start, start + of) if pruned[row, j] != 0]
            best = sorted(range(start, start + of), key=lambda j: -scores[row, j].item())[:keep]
            assert kept == sorted(best)


def test_equal_inputs_make_it_magnitude_within_rows() -> None:
    weight, _ = problem()
    pruned = wanda(weight, torch.full((12,), 3.0), 0.5)
    assert torch.equal(pruned == 0, lowest_of_rows(weight.abs(), 0.5))


def test_dead_inputs_go_first_and_the_smallest_of_them_before_the_others() -> None:
    weight, x = problem(inputs=8)
    x[:, [1, 4, 6]] = 0
    norms = squares(x).sqrt()
    assert (wanda(weight, norms, 3 / 8)[:, [1, 4, 6]] == 0).all()
    two = wanda(weight, norms, 2 / 8)
    for row, before in zip(two, weight, strict=True):
        assert {j for j in range(8) if row[j] == 0} == set(sorted((1, 4, 6), key=lambda j: abs(before[j].item()))[:2])
    nothing = wanda(weight, torch.zeros(8), 0.5)
    assert torch.equal(nothing == 0, lowest_of_rows(weight.abs(), 0.5))


@FAMILIES
def test_the_step_is_wanda_of_plain_forward_passes_over_blocks_already_pruned(family: str) -> None:
    model, task = tiny.model(family, layers=3), tiny.task()
    pruned = Wanda(sparsity=0.6, samples=40, seed=3, precision="fp32")(model, task)
    slow, texts = model.copy(), single_texts(task.calibration(model, 40, seed=3))
    for block in blocks_of(slow.module):
        parts = [part for part in block.modules() if isinstance(part, nn.Linear)]
        for part, x in zip(parts, inputs_of(slow, texts, parts), strict=True):
            for row, gone in zip(part.weight.data, by_loops(part.weight, x, 0.6), strict=True):
                row[sorted(gone)] = 0.0
    assert pruned.fingerprint() == slow.fingerprint()
    assert pruned.history[-1]["calibration_tokens"] == sum(text["input_ids"].numel() for text in texts)


@FAMILIES
@torch.no_grad()
def test_sums_are_those_of_all_tokens_and_shared_where_parts_read_the_same(family: str) -> None:
    model, row = tiny.model(family), family_of(tiny.model(family).module)
    batches = tiny.task().calibration(model, 40)
    assert len(batches) > 1
    paths = [row.query, row.key, row.value, row.attention_output, row.up, row.down]
    calls: list[torch.Size] = []

    def measure(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return squares(x)

    block = next(walk_blocks(model.module, batches))
    sums = block.sums(paths, measure)
    parts: Any = [block.module.get_submodule(path) for path in paths]
    for path, x in zip(paths, inputs_of(model, single_texts(batches), parts), strict=True):
        torch.testing.assert_close(sums[path], x.square().sum(0), rtol=1e-5, atol=1e-8)
    assert sums[row.query] is sums[row.key] is sums[row.value]
    assert len(calls) == 4 * len(batches)
    assert not any(part._forward_pre_hooks for part in model.module.modules())


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@STEPS
def test_a_pattern_holds_in_the_model_and_skips_what_it_does_not_fit(step: Any, pattern: str) -> None:
    model = tiny.model(neurons=30)
    pruned = step(pattern=pattern, samples=16)(model, tiny.task())
    skipped = pruned.history[-1]["skipped"]
    for name, linear in inside(pruned).items():
        if linear.in_features == 30:
            assert torch.equal(linear.weight, model.linears()[name].weight)
            assert skipped[name] == "its 30 inputs are no multiple of 4"
        else:
            left = (linear.weight.view(len(linear.weight), -1, 4) != 0).sum(-1)
            assert (left == int(pattern[0])).all()
    assert any(linear.in_features == 30 for linear in inside(pruned).values())


def test_a_row_keeps_its_best_weight_and_the_notes_say_so() -> None:
    model, task = tiny.model(), tiny.task()
    entry = Wanda(sparsity=1.0, samples=16)(model, task)
    rows = 0
    for linear in inside(entry).values():
        assert ((linear.weight != 0).sum(1) == 1).all()
        rows += len(linear.weight)
    assert entry.history[-1]["rows_that_keep_their_best_weight"] == rows
    assert "rows_that_keep_their_best_weight" not in Wanda(sparsity=0.9, samples=16)(model, task).history[-1]


@STEPS
def test_no_sparsity_changes_nothing(step: Any) -> None:
    model = tiny.model()
    same = step(sparsity=0.0, samples=16)(model, tiny.task())
    assert same.fingerprint() == model.fingerprint()
    assert same.history[-1]["changed"] == {}
    assert {same.history[-1]["skipped"][name] for name in inside(model)} == {"nothing in it was to be pruned"}


@STEPS
def test_zeros_of_an_earlier_pruning_count_and_stay(step: Any) -> None:
    task = tiny.task()
    once = step(sparsity=0.5, samples=16)(tiny.model(), task)
    twice, more = step(sparsity=0.5, samples=16)(once, task), step(sparsity=0.75, samples=16)(once, task)
    assert twice.fingerprint() == once.fingerprint()
    for before, after in zip(inside(once).values(), inside(more).values(), strict=True):
        assert (after.weight[before.weight == 0] == 0).all()
        assert (after.weight == 0).sum() == 0.75 * after.weight.numel()


@STEPS
def test_the_notes_count_zeros_measure_bytes_and_promise_no_speed(step: Any) -> None:
    model = tiny.model(neurons=256)
    pruned = step(sparsity=0.75, samples=32)(model, tiny.task())
    entry, weights = pruned.history[-1], [linear.weight for linear in inside(pruned).values()]
    assert entry["zeros"] == sum(int((weight == 0).sum()) for weight in weights)
    assert entry["sparsity"] == pytest.approx(0.75)
    for bytes_, made in zip(entry["compressed_bytes"], (model, pruned), strict=True):
        raw = b"".join(p.detach().numpy().tobytes() for p in made.module.parameters())
        assert bytes_ == pytest.approx(len(zlib.compress(raw)), rel=0.05)
    assert entry["compressed_bytes"][1] < 0.8 * entry["compressed_bytes"][0]
    assert entry["summary"].endswith("speed: unchanged, because dense kernels multiply by zeros as by any number")
    assert "emptied" not in entry
    assert "about" not in entry["summary"]


def test_a_large_model_is_measured_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=made) for size in (700_000, 10, 400_000)]
    tensors[0][torch.rand(700_000, generator=made) < torch.linspace(0, 1, 700_000)] = 0.0  # denser at one end than at the other
    assert compressed_bytes(tensors, 0.3) == pytest.approx(compressed_bytes(tensors), rel=0.03)
    monkeypatch.setattr(_sparsity, "SAMPLE", 10_000)
    assert "about" in Wanda(samples=16)(tiny.model(), tiny.task()).history[-1]["summary"]


def test_of_equal_scores_the_first_go() -> None:
    """As a stable sort has it, which finds the lowest more slowly."""
    made = torch.Generator().manual_seed(0)
    for scores in (torch.randn(7, 30, generator=made), torch.randint(0, 4, (7, 30), generator=made).float(), torch.zeros(3, 8)):
        for sparsity in (0.0, 0.1, 0.5, 0.9, 1.0):
            count = min(round(sparsity * scores.shape[1]), scores.shape[1] - 1)
            expected = torch.zeros_like(scores, dtype=torch.bool)
            expected.scatter_(1, torch.argsort(scores, dim=1, stable=True)[:, :count], True)
            assert torch.equal(lowest_of_rows(scores, sparsity), expected)
            flat = torch.zeros(scores.numel(), dtype=torch.bool)
            flat[scores.flatten().argsort(stable=True)[: round(sparsity * scores.numel())]] = True
            assert torch.equal(lowest(scores, sparsity), flat.view_as(scores))


@STEPS
def test_texts_read_in_bf16_choose_nearly_the_same_weights(step: Any) -> None:
    """What is summed of them is summed in fp32: in bf16 a sum of squares would stop growing at 256 times what is added."""
    fine, coarse = (step(sparsity=0.5, samples=64, precision=how)(tiny.model(), tiny.task()) for how in ("fp32", "bf16"))
    zeros = [torch.cat([(linear.weight == 0).flatten() for linear in inside(made).values()]) for made in (fine, coarse)]
    assert float((zeros[0] == zeros[1]).float().mean()) > 0.95


@STEPS
def test_sublayers_that_are_gone_are_no_obstacle(step: Any) -> None:
    model = tiny.uneven(tiny.model(layers=3))
    pruned = step(sparsity=0.5, samples=16)(model, tiny.task())
    assert pruned.history[-1]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert set(pruned.history[-1]["changed"]) == set(inside(model))


@STEPS
def test_what_cannot_be_pruned_is_one_clear_error(step: Any) -> None:
    task, name = tiny.task(), step(samples=4).name
    quantized, integers, empty, broken = (tiny.model() for _ in range(4))
    quantized.module.is_quantized = True
    integers.linears()["bert.encoder.layer.0.output.dense"].weight = nn.Parameter(torch.ones(32, 32).to(torch.int8), False)
    keep_blocks(empty.module, [])
    with torch.no_grad():
        blocks_of(broken.module)[1].get_submodule("output.dense").weight[0, 0] = torch.nan
        blocks_of(broken.module)[0].get_submodule("intermediate.dense").weight[0, 0] = torch.inf
    for model, words in (
        (quantized, "already quantized"),
        (integers, "already quantized"),
        (empty, "no blocks with linear layers"),
        (broken, "layer.0.intermediate.dense.weight has numbers that are not finite"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            step(samples=4)(model, task)
        assert len(caught.value.problems) == 1
        assert str(caught.value).startswith(f"{name}: ")


@STEPS
def test_no_calibration_texts_is_an_error(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny.task()), "calibration", lambda *_, **__: [])
    with pytest.raises(InputError, match=f"{step(samples=1).name}: there are no calibration texts"):
        step(samples=4)(tiny.model(), tiny.task())


@STEPS
def test_every_bad_field_is_named(step: Any) -> None:
    with pytest.raises(InputError) as caught:
        step(sparsity=-0.1, pattern="4:4", samples=0)
    assert len(caught.value.problems) == 3
    with pytest.raises(InputError, match="sparsity"):
        step(sparsity=float("nan"))
