"""The repair against plain least squares, and against the structured pruning that has it built in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from multum.core.families import base_of, blocks_of, family_of
from multum.core.model import Model
from multum.core.second_order import Repair, damped, solve_on_support
from multum.core.surgery import head_size, keep_blocks, keep_heads, keep_neurons
from multum.core.task import Batch
from multum.errors import InputError
from multum.steps.drop_layers import DropLayers
from multum.steps.prune_structured import PruneStructured
from multum.steps.prune_weights import PruneWeights
from multum.steps.reconstruct import Reconstruct, teacher_blocks
from multum.steps.trim_vocabulary import TrimVocabulary
from multum.steps.wanda import Wanda

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.fixture(scope="module")
def tuned() -> Model:
    """A model that has learnt its task."""
    model, task = tiny.model(layers=3), tiny.task()
    optimizer = torch.optim.Adam(model.module.parameters(), lr=2e-3)
    for _ in range(15):
        for batch in task.batches(model, "train", 32):
            optimizer.zero_grad()
            task.loss(model.module(**batch), batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def teacher(tuned: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole") / "model"
    tuned.save(folder)
    return str(folder)


@torch.no_grad()
def kl(whole: Model, other: Model, batches: Sequence[Batch]) -> float:
    p, q = (torch.cat([m.module(**batch).logits for batch in batches]).double().log_softmax(-1) for m in (whole, other))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


@torch.no_grad()
def seen_by(model: Model, path: str, batches: Sequence[Batch]) -> np.ndarray:
    """What flows into one part (named from the base model) in plain forward passes, padding left out, (tokens, features)."""
    seen: list[torch.Tensor] = []
    handle = base_of(model.module).get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in batches:
        model.module(**batch)
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches, strict=True)]).double().numpy()


def narrower(model: Model) -> Model:
    """Heads and neurons gone in every block, an attention and a feed-forward with nothing left."""
    result, family = model.copy(), family_of(model.module)
    kept = (([0, 2], range(20)), ([], range(4, 32)), ([1, 2, 3], []))
    for block, (heads, neurons) in zip(blocks_of(result.module), kept, strict=True):
        keep_heads(block, family, heads, head_size(model.module))
        keep_neurons(block, family, list(neurons))
    return result


CUTS: dict[str, Any] = {
    "heads and neurons": lambda model, task: narrower(model),
    "whole blocks": lambda model, task: DropLayers(which=(1,))(model, task),
    "magnitude": lambda model, task: PruneWeights(sparsity=0.6)(model, task),
    "wanda 2:4": lambda model, task: Wanda(pattern="2:4", samples=48)(model, task),
}


@pytest.mark.parametrize("kind", CUTS)
def test_flows_come_nearer_in_every_block_answers_too_and_zeros_stay(kind: str, tuned: Model, teacher: str) -> None:
    task = tiny.task()
    batches = task.calibration(tuned, 48)
    cut = CUTS[kind](tuned, task)
    mended = Reconstruct(teacher=teacher, samples=48)(cut, task)
    assert kl(tuned, mended, batches) < kl(tuned, cut, batches)
    family, numbers = family_of(tuned.module), mended.history[-1]["teacher_blocks"]
    assert numbers == ([0, 2] if kind == "whole blocks" else [0, 1, 2])
    for ours, theirs in enumerate(numbers):
        for norm in (family.attention_norm, family.feed_forward_norm):
            wanted = seen_by(tuned, f"{family.blocks}.{theirs}.{norm}", batches)
            before, after = (np.square(seen_by(m, f"{family.blocks}.{ours}.{norm}", batches) - wanted).sum() for m in (cut, mended))
            assert after < before or before == 0 == after  # nothing is lost in front of a block that was dropped
    for name, linear in cut.linears().items():
        assert torch.equal(mended.linears()[name].weight == 0, linear.weight == 0)
    zeros = sum(int((linear.weight == 0).sum()) for name, linear in cut.linears().items() if name.endswith("output.dense"))
    assert mended.history[-1]["zeros_kept"] == zeros
    assert mended.history[-1]["repaired"]["on_their_zeros"] == (6 if zeros else 0)


@FAMILIES
def test_with_nothing_cut_nothing_changes(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    model.save(tmp_path / "whole")
    same = Reconstruct(teacher=str(tmp_path / "whole"), samples=40)(model, tiny.task())
    assert same.fingerprint() == model.fingerprint()
    reasons = same.history[-1]["skipped"]
    assert sorted(set(reasons.values())) == [
        "nothing was lacking",
        "only output matrices are repaired",
        "only output matrices of the blocks are repaired",
    ]


def test_it_is_the_repair_of_prune_structured(tuned: Model, teacher: str) -> None:
    """Also where blocks were dropped: the history says which."""
    task = tiny.task()
    for speedup in (1.5, 12.0):
        step = {"speedup": speedup, "samples": 48, "neuron_group": 4}
        built_in, plain = (PruneStructured(**step, repair=on)(tuned, task) for on in (True, False))
        mended = Reconstruct(teacher=teacher, samples=48)(plain, task)
        assert mended.fingerprint() == built_in.fingerprint() != plain.fingerprint()
        assert mended.history[-1]["teacher_blocks"] == plain.history[-1]["kept_blocks"]
    assert len(plain.history[-1]["kept_blocks"]) < 3


@pytest.mark.parametrize("sparse", [False, True])
def test_the_first_matrix_is_a_ridge_regression_of_each_row_on_what_it_still_has(sparse: bool, tuned: Model, teacher: str) -> None:
    task, damping = tiny.task(), 0.05
    batches = task.calibration(tuned, 48)
    cut = PruneWeights(sparsity=0.5)(tuned, task) if sparse else narrower(tuned)
    family = family_of(tuned.module)
    path, norm = (f"{family.blocks}.0.{part}" for part in (family.attention_output, family.attention_norm))
    features = seen_by(cut, path, batches)
    lack = seen_by(tuned, norm, batches) - seen_by(cut, norm, batches)
    centred = features - features.mean(0)
    ridge = np.sqrt(damping * np.square(centred).sum(0).mean()) * np.eye(features.shape[1])
    before: Any = base_of(cut.module).get_submodule(path)
    after: Any = base_of(Reconstruct(teacher=teacher, samples=48, damping=damping)(cut, task).module).get_submodule(path)
    for i, row in enumerate(before.weight.detach().double().numpy()):
        has = row != 0
        assert has.all() or sparse
        rows, wanted = np.vstack([centred, ridge])[:, has], np.append(lack[:, i] - lack[:, i].mean(), np.zeros(len(ridge)))
        slope = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        expected = row.copy()
        expected[has] += slope
        np.testing.assert_allclose(after.weight[i].detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        shift = lack[:, i].mean() - features.mean(0)[has] @ slope
        assert after.bias[i].item() == pytest.approx(before.bias[i].item() + shift, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("tokens", [200, 6])
def test_rows_on_their_support_are_each_solved_exactly(tokens: int) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 20, generator=made, dtype=torch.double) @ torch.randn(20, 20, generator=made, dtype=torch.double)
    s, b = damped(x.T @ x * torch.logspace(-2, 2, 20).outer(torch.logspace(-2, 2, 20))), torch.randn(7, 20, generator=made).double()
    support = torch.rand(7, 20, generator=made) < torch.tensor([1.0, 0.0, 0.95, 0.7, 0.5, 0.3, 0.1])[:, None]
    assert support[0].all()
    assert not support[1].any()
    solved = solve_on_support(s, b, support)
    assert (solved[~support] == 0).all()
    for row, wanted, has in zip(solved, b, support, strict=True):
        expected = torch.linalg.solve(s[has][:, has], wanted[has]) if has.any() else torch.zeros(0).double()
        assert (row[has] - expected).norm() <= 1e-8 * expected.norm()


def test_a_full_support_is_no_restriction() -> None:
    made, sums = torch.Generator().manual_seed(0), Repair()
    sums.add(torch.randn(80, 12, generator=made), torch.randn(80, 5, generator=made))
    for plain, restricted in zip(sums.solve(0.1), sums.solve(0.1, torch.ones(5, 12, dtype=torch.bool)), strict=True):
        torch.testing.assert_close(plain, restricted, rtol=1e-5, atol=1e-7)
    weak, strong = (sums.solve(damping)[0].norm() for damping in (0.01, 10.0))
    assert strong < weak


def test_a_trimmed_vocabulary_is_read_by_its_own_ids(tuned: Model, teacher: str) -> None:
    task = tiny.task()
    trimmed = TrimVocabulary()(tuned, task)
    assert trimmed.parameters() < tuned.parameters()
    assert Reconstruct(teacher=teacher, samples=48)(trimmed, task).fingerprint() == trimmed.fingerprint()


def test_without_a_history_equal_counts_go_together(tuned: Model) -> None:
    stranger = tiny.model(layers=3, seed=5)
    stranger.source = "elsewhere"
    assert teacher_blocks(tuned, stranger) == [0, 1, 2]
    short = tuned.copy()
    keep_blocks(short.module, [0, 1])
    other = tiny.model("roberta", layers=3, hidden=16)
    with pytest.raises(InputError, match="the model has 2 blocks and the teacher 3") as caught:
        teacher_blocks(short, stranger)
    assert len(caught.value.problems) == 1
    with pytest.raises(InputError) as caught:
        teacher_blocks(tuned, other)
    assert len(caught.value.problems) == 2
    assert all(problem.startswith("reconstruct: the model") for problem in caught.value.problems)


def test_models_that_read_other_tokens_are_refused(tuned: Model, teacher: str) -> None:
    other = tuned.copy()
    other.tokenizer = tiny.model("roberta").tokenizer
    with pytest.raises(InputError, match="reconstruct: what flows is compared token by token"):
        Reconstruct(teacher=teacher, samples=16)(other, tiny.task())


def test_quantized_models_and_missing_texts_are_refused(tuned: Model, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = tuned.copy()
    quantized.module.is_quantized = True
    with pytest.raises(InputError, match="reconstruct: the model is already quantized"):
        Reconstruct(teacher=teacher)(quantized, tiny.task())
    monkeypatch.setattr(type(tiny.task()), "calibration", lambda *_, **__: [])
    with pytest.raises(InputError, match="reconstruct: there are no calibration texts"):
        Reconstruct(teacher=teacher)(tuned, tiny.task())


def test_every_bad_field_is_named() -> None:
    with pytest.raises(InputError) as caught:
        Reconstruct(teacher="", samples=0, damping=0.0)
    assert len(caught.value.problems) == 3
