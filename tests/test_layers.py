"""Every loss on layers against explicit loops, and the maps against their definitions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from multum.core.capture import Attention, Captured, Shape, capture, shape_of
from multum.errors import InputError
from multum.steps._layer_maps import descent, evenly, layer_pairs, monotone_match
from multum.steps._layers import (
    LayerLosses,
    LayerMatcher,
    attended,
    attention_loss,
    log_relations,
    pkd_loss,
    relation_loss,
    state_loss,
)
from multum.steps.drop_layers import DropLayers

LENGTHS = (5, 3, 1)
TOKENS = 6
KINDS = ("embeddings", "hidden", "attention", "relations", "pkd")


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: tuple[int, ...] = LENGTHS, tokens: int = TOKENS) -> torch.Tensor:
    return torch.tensor([[i < length for i in range(tokens)] for length in lengths])


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_state_loss_by_loops() -> None:
    student, teacher = some(3, TOKENS, 4, seed=1), some(3, TOKENS, 4, seed=2)
    expected = mean(
        mean((student[b, t, i].item() - teacher[b, t, i].item()) ** 2 for t in range(LENGTHS[b]) for i in range(4))
        for b in range(3)
    )
    assert state_loss(student, teacher, mask_of()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_loss_by_loops(causal: bool) -> None:
    student, teacher = some(3, 2, TOKENS, TOKENS, seed=1), some(3, 2, TOKENS, TOKENS, seed=2)
    expected = mean(
        mean(
            (student[b, h, i, j].item() - teacher[b, h, i, j].item()) ** 2
            for h in range(2)
            for i in range(LENGTHS[b])
            for j in range(i + 1 if causal else LENGTHS[b])
        )
        for b in range(3)
    )
    found = attention_loss(student, teacher, attended(mask_of(), causal=causal))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def relation_by_loops(states: torch.Tensor, b: int, head: int, heads: int, i: int, seen: list[int]) -> list[float]:
    """The softmax over `seen` of token i's products, one relation head of all heads side by side."""
    side_by_side = [[x for h in range(states.shape[1]) for x in states[b, h, t].tolist()] for t in range(states.shape[2])]
    size = len(side_by_side[0]) // heads
    cut = [vector[head * size : (head + 1) * size] for vector in side_by_side]
    products = [sum(x * y for x, y in zip(cut[i], cut[j], strict=True)) / math.sqrt(size) for j in seen]
    total = sum(math.exp(p) for p in products)
    return [math.exp(p) / total for p in products]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relation_loss_by_loops_with_other_widths_and_heads(heads: int, causal: bool) -> None:
    student, teacher = some(3, 2, TOKENS, 4, seed=1), some(3, 3, TOKENS, 4, seed=2)
    expected = mean(
        mean(
            sum(p * math.log(p / q) for p, q in zip(ps, qs, strict=True))
            for a in range(heads)
            for i in range(LENGTHS[b])
            for seen in [list(range(i + 1 if causal else LENGTHS[b]))]
            for ps in [relation_by_loops(teacher, b, a, heads, i, seen)]
            for qs in [relation_by_loops(student, b, a, heads, i, seen)]
        )
        for b in range(3)
    )
    found = relation_loss(student, teacher, heads, attended(mask_of(), causal=causal))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_relations_are_distributions_over_real_tokens() -> None:
    found = log_relations(some(3, 2, TOKENS, 4), 4, attended(mask_of(), causal=False)).exp()
    for b, length in enumerate(LENGTHS):
        assert torch.allclose(found[b, :, :length, :length].sum(-1), torch.ones(4, length), atol=1e-6)
        assert torch.all(found[b, :, :length, length:] == 0)


def test_pkd_loss_by_loops_reads_the_first_real_token() -> None:
    student, teacher = some(3, TOKENS, 4, seed=1), some(3, TOKENS, 4, seed=2)

    def direction(vector: torch.Tensor) -> list[float]:
        length = math.sqrt(sum(x * x for x in vector.tolist()))
        return [x / length for x in vector.tolist()]

    def expected(first: tuple[int, int, int]) -> float:
        return mean(
            sum((x - y) ** 2 for x, y in zip(direction(student[b, t]), direction(teacher[b, t]), strict=True))
            for b, t in enumerate(first)
        )

    assert pkd_loss(student, teacher, mask_of()).item() == pytest.approx(expected((0, 0, 0)), rel=1e-5)
    assert pkd_loss(student, teacher, mask_of().flip(1)).item() == pytest.approx(expected((1, 3, 5)), rel=1e-5)
    assert pkd_loss(3 * student, teacher, mask_of()).item() == pytest.approx(expected((0, 0, 0)), rel=1e-5)


# The whole matcher, on made-up captured passes


def passed(layers: int = 2, width: int = 8, heads: int = 4, *, seed: int = 0, texts: int = 3, tokens: int = TOKENS) -> Captured:
    size = width // heads
    return Captured(
        hidden={layer: some(texts, tokens, width, seed=seed + layer) for layer in range(layers + 1)},
        attention={
            layer: Attention(*(some(texts, heads, tokens, size, seed=seed + 10 * layer + i) for i in range(3)), size**-0.5, False)
            for layer in range(1, layers + 1)
        },
    )


def shape(layers: int = 2, width: int = 8, heads: int = 4) -> Shape:
    return Shape(widths=(width,) * (layers + 1), heads=dict.fromkeys(range(1, layers + 1), (heads, heads, width // heads)))


def change(captured: Captured, how: Any) -> Captured:
    """`how` of every tensor and of which of its dimensions the tokens are."""
    return Captured(
        hidden={layer: how(state, 1) for layer, state in captured.hidden.items()},
        attention={
            layer: Attention(how(part.query, 2), how(part.key, 2), how(part.value, 2), part.scaling, part.causal)
            for layer, part in captured.attention.items()
        },
    )


def all_losses(**changes: Any) -> LayerLosses:
    return LayerLosses(**{**dict.fromkeys(KINDS, 1.0), **changes})


EVERY_MAP = pytest.mark.parametrize("layer_map", ["uniform", "last", "dynamic", (1, 2)])


@EVERY_MAP
def test_equal_models_have_nothing_to_learn(layer_map: Any) -> None:
    matcher, inside = LayerMatcher(all_losses(layer_map=layer_map), shape(), shape()), passed()
    parts = matcher.parts(inside, inside, mask_of())
    assert sorted(parts) == sorted(KINDS)
    for name, value in parts.items():
        assert value.item() == pytest.approx(0.0, abs=1e-6), name
    for name, value in matcher.parts(inside, passed(seed=100), mask_of()).items():
        assert value.item() > 0.01, name


@EVERY_MAP
def test_neither_padding_nor_the_order_of_texts_changes_a_loss(layer_map: Any) -> None:
    matcher = LayerMatcher(all_losses(layer_map=layer_map), shape(), shape())
    ours, theirs, mask = passed(), passed(seed=100), mask_of()
    expected = matcher.parts(ours, theirs, mask)

    def longer(x: torch.Tensor, tokens: int) -> torch.Tensor:
        return torch.cat([x, 100 * torch.ones_like(x)], dim=tokens)

    def turned(x: torch.Tensor, _: int) -> torch.Tensor:
        return x[[2, 0, 1]]

    padded = matcher.parts(change(ours, longer), change(theirs, longer), torch.cat([mask, torch.zeros_like(mask)], dim=1))
    moved = matcher.parts(change(ours, turned), change(theirs, turned), mask[[2, 0, 1]])
    for name in KINDS:
        assert padded[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name
        assert moved[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_a_batch_is_the_mean_of_its_texts() -> None:
    matcher, ours, theirs, mask = LayerMatcher(all_losses(), shape(), shape()), passed(), passed(seed=100), mask_of()
    whole = matcher(ours, theirs, mask).item()

    def alone(text: int) -> float:
        def cut(x: torch.Tensor, _: int) -> torch.Tensor:
            return x[text : text + 1]

        return float(matcher(change(ours, cut), change(theirs, cut), mask[text : text + 1]))

    assert mean(alone(text) for text in range(3)) == pytest.approx(whole, rel=1e-5)


@EVERY_MAP
def test_the_sum_is_weighted_and_the_teacher_learns_nothing(layer_map: Any) -> None:
    weights = {"embeddings": 0.5, "hidden": 2.0, "attention": 3.0, "relations": 0.25, "pkd": 4.0}
    matcher = LayerMatcher(LayerLosses(layer_map=layer_map, **weights), shape(width=12), shape())
    ours, theirs = change(passed(width=12), lambda x, _: x.requires_grad_()), passed(seed=100)
    parts, total = matcher.parts(ours, theirs, mask_of()), matcher(ours, theirs, mask_of())
    assert total.item() == pytest.approx(sum(weights[name] * value.item() for name, value in parts.items()), rel=1e-5)
    total.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in matcher.parameters())
    assert ours.attention[2].value.grad.abs().sum() > 0
    assert all(state.grad is None for state in theirs.hidden.values())


@EVERY_MAP
def test_half_precision_is_brought_to_the_teachers_width_in_single(layer_map: Any) -> None:
    matcher = LayerMatcher(all_losses(layer_map=layer_map), shape(width=12), shape())
    half, theirs = change(passed(width=12), lambda x, _: x.bfloat16()), passed(seed=100)
    expected = matcher(change(half, lambda x, _: x.float()), theirs, mask_of())
    assert matcher(half, theirs, mask_of()).item() == expected.item()


def test_hidden_loss_is_the_formula_with_a_matrix_between_the_widths() -> None:
    matcher = LayerMatcher(LayerLosses(hidden=1.0, embeddings=1.0), shape(2, 6, 2), shape(4))
    ours, theirs = passed(2, 6, 2), passed(4, seed=100)
    assert matcher.hidden.weight.shape == (8, 6)
    expected = mean(
        state_loss(ours.hidden[m] @ matcher.hidden.weight.T, theirs.hidden[n], mask_of()).item() for m, n in [(1, 2), (2, 4)]
    )
    parts = matcher.parts(ours, theirs, mask_of())
    assert parts["hidden"].item() == pytest.approx(expected, rel=1e-5)
    expected = state_loss(ours.hidden[0] @ matcher.embeddings.weight.T, theirs.hidden[0], mask_of()).item()
    assert parts["embeddings"].item() == pytest.approx(expected, rel=1e-5)


def test_attention_and_relations_are_the_formula_on_the_pairs_of_the_map() -> None:
    matcher = LayerMatcher(LayerLosses(attention=1.0, relations=1.0, relation_heads=2), shape(2), shape(4, 16))
    ours, theirs = passed(2), passed(4, 16, seed=100)
    pairs, parts = attended(mask_of(), causal=False), matcher.parts(ours, theirs, mask_of())
    expected = mean(
        attention_loss(ours.attention[m].scores(), theirs.attention[n].scores(), pairs).item() for m, n in [(1, 2), (2, 4)]
    )
    assert parts["attention"].item() == pytest.approx(expected, rel=1e-5)
    expected = mean(
        relation_loss(getattr(ours.attention[2], x), getattr(theirs.attention[4], x), 2, pairs).item()
        for x in ("query", "key", "value")
    )
    assert parts["relations"].item() == pytest.approx(expected, rel=1e-5)


def test_pkd_leaves_the_last_layer_out_unless_it_is_the_only_one() -> None:
    ours, theirs = passed(), passed(seed=100)
    parts = LayerMatcher(LayerLosses(pkd=1.0), shape(), shape()).parts(ours, theirs, mask_of())
    assert parts["pkd"].item() == pytest.approx(pkd_loss(ours.hidden[1], theirs.hidden[1], mask_of()).item(), rel=1e-5)
    parts = LayerMatcher(LayerLosses(pkd=1.0, layer_map="last"), shape(), shape()).parts(ours, theirs, mask_of())
    assert parts["pkd"].item() == pytest.approx(pkd_loss(ours.hidden[2], theirs.hidden[2], mask_of()).item(), rel=1e-5)


def test_a_matrix_only_where_it_is_needed_or_asked_for() -> None:
    assert not list(LayerMatcher(all_losses(), shape(), shape()).parameters())
    asked = LayerMatcher(all_losses(project=True), shape(), shape())
    assert torch.equal(asked.hidden.weight, torch.eye(8))
    assert len(list(asked.parameters())) == 2
    assert not list(LayerMatcher(LayerLosses(relations=1.0), shape(2, 12), shape()).parameters())


def test_only_what_is_looked_at_is_wanted() -> None:
    wanted = LayerMatcher(all_losses(relation_heads=2), shape(2), shape(6)).wanted
    assert (wanted.hidden, wanted.attention) == ((0, 3, 6), (3, 6))
    wanted = LayerMatcher(LayerLosses(relations=1.0, teacher_layer=5), shape(2), shape(6)).wanted
    assert (wanted.hidden, wanted.attention) == ((), (5,))
    wanted = LayerMatcher(LayerLosses(hidden=1.0, layer_map="dynamic"), shape(8), shape(12)).wanted
    assert (wanted.hidden, wanted.attention) == ((3, 6, 9, 12), ())


# Maps


def test_uniform_is_that_of_the_papers() -> None:
    assert evenly(4, 12) == [3, 6, 9, 12]
    assert evenly(6, 12) == [2, 4, 6, 8, 10, 12]
    assert evenly(5, 12) == [2, 5, 7, 10, 12]
    assert evenly(12, 12) == list(range(1, 13))
    assert evenly(4, 2) == [1, 1, 2, 2]
    assert layer_pairs("uniform", 2, 4) == ([(1, 2), (2, 4)], [])


def test_the_other_maps() -> None:
    assert layer_pairs("last", 3, 12) == ([(3, 12)], [])
    assert layer_pairs("last", 3, 12, 10) == ([(3, 10)], [])
    assert layer_pairs((5, 5, 12), 3, 12) == ([(1, 5), (2, 5), (3, 12)], [])
    assert layer_pairs("dynamic", 3, 12) == ([(0, 6), (0, 12)], [])
    assert layer_pairs("dynamic", 12, 12) == ([(0, 3), (0, 6), (0, 9), (0, 12)], [])
    assert layer_pairs("dynamic", 1, 6) == ([(0, 6)], [])
    assert layer_pairs("dynamic", 3, 12, None, (6, 12)) == ([(0, 6), (0, 12)], [])


def test_a_student_cut_from_its_teacher_is_compared_with_what_the_next_block_read() -> None:
    teacher = tiny.model(layers=6)
    cut = DropLayers(which=(1, 4))(teacher, tiny.task())
    assert descent(cut, teacher) == [0, 2, 3, 5]
    assert layer_pairs("uniform", 4, 6, descent=[0, 2, 3, 5])[0] == [(1, 2), (2, 3), (3, 5), (4, 6)]
    again = DropLayers(which=(0,))(cut, tiny.task())
    assert descent(again, teacher) == [2, 3, 5]
    assert descent(again, cut) == [1, 2, 3]
    assert descent(teacher, teacher) == list(range(6))
    assert layer_pairs("uniform", 6, 6, descent=list(range(6)))[0] == layer_pairs("uniform", 6, 6)[0]
    assert descent(cut, again) is None
    assert descent(tiny.model("roberta", layers=6), teacher) is None


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (2, 3), (3, 3), (3, 6), (4, 7)])
def test_the_dynamic_match_is_the_best_of_all_ascending_ones(rows: int, columns: int) -> None:
    for seed in range(5):
        costs = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).tolist()
        every = itertools.combinations(range(columns), rows)
        best = min(every, key=lambda chosen: sum(row[column] for row, column in zip(costs, chosen, strict=True)))
        assert monotone_match(costs) == list(best)


def test_dynamic_finds_the_layers_that_are_alike() -> None:
    theirs = passed(4, seed=100)
    ours = Captured(hidden={layer: some(3, TOKENS, 8, seed=layer) for layer in range(7)}, attention={})
    ours.hidden[2], ours.hidden[5] = theirs.hidden[2] + 0.1, theirs.hidden[4] + 0.1
    losses = LayerLosses(hidden=1.0, layer_map="dynamic", dynamic_layers=(2, 4))
    parts = LayerMatcher(losses, shape(6), shape(4)).parts(ours, theirs, mask_of())
    assert parts["hidden"].item() == pytest.approx(0.01, rel=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "one of embeddings, hidden, attention, relations, pkd must be above 0"),
        ({"hidden": -1.0}, "hidden is a weight"),
        ({"hidden": math.nan}, "hidden is a weight"),
        ({"hidden": math.inf}, "hidden is a weight"),
        ({"hidden": "x"}, "hidden is a weight"),
        ({"hidden": 1.0, "layer_map": ["a"]}, "layer_map must name"),
        ({"hidden": 1.0, "layer_map": 3}, "layer_map must name"),
        ({"relations": 1.0, "relation_heads": 2.5}, "relation_heads must be at least 1"),
        ({"hidden": 1.0, "dynamic_layers": 3}, "ascending"),
        ({"hidden": 1.0, "layer_map": "first"}, "layer_map must be"),
        ({"hidden": 1.0, "layer_map": (0, 2)}, "counted from 1"),
        ({"hidden": 1.0, "layer_map": ()}, "layer_map must name"),
        ({"hidden": 1.0, "relation_heads": 0}, "relation_heads must be at least 1"),
        ({"hidden": 1.0, "teacher_layer": 0}, "teacher_layer must be at least 1"),
        ({"hidden": 1.0, "dynamic_layers": (4, 2)}, "ascending"),
    ],
)
def test_bad_values(fields: Any, problem: str) -> None:
    (found,) = LayerLosses(**fields).problems()
    assert problem in found
    with pytest.raises(InputError, match=problem):
        LayerMatcher(LayerLosses(**fields), shape(), shape())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"hidden": 1.0, "layer_map": (1, 2, 3)}, "names 3 teacher layers, but the student has 2 layers"),
        ({"hidden": 1.0, "layer_map": (2, 5)}, "the teacher has the layers 1 to 4, no 5"),
        ({"hidden": 1.0, "layer_map": "last", "teacher_layer": 7}, "teacher_layer: the teacher has the layers 1 to 4, no 7"),
        ({"hidden": 1.0, "layer_map": "dynamic", "dynamic_layers": (1, 2, 3)}, "has only 2 to match"),
        (
            {"hidden": 1.0, "layer_map": "dynamic", "dynamic_layers": (1, 9)},
            "dynamic_layers: the teacher has the layers 1 to 4, no 9",
        ),
        ({"attention": 1.0}, "layer 1 has 3 heads and the teacher's layer 2 has 4; use relations"),
        ({"relations": 1.0, "relation_heads": 3}, r"12 in the student and 8 in the teacher: 1, 2, 4 \(got 3\)"),
    ],
)
def test_what_does_not_fit_two_models(fields: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        LayerMatcher(LayerLosses(**fields), shape(2, 12, 3), shape(4))


@pytest.mark.parametrize("which", [0, 1])
def test_the_first_token_of_a_causal_model_is_not_compared(which: int) -> None:
    shapes = [shape(), shape()]
    shapes[which] = replace(shapes[which], causal=True)
    LayerMatcher(LayerLosses(hidden=1.0), *shapes)
    with pytest.raises(InputError, match="pkd compares the first token, which sees only itself"):
        LayerMatcher(LayerLosses(pkd=1.0), *shapes)


def test_all_problems_at_once() -> None:
    with pytest.raises(InputError) as caught:
        LayerMatcher(LayerLosses(hidden=1.0, layer_map=(9, 9, 9), teacher_layer=8), shape(), shape())
    assert len(caught.value.problems) == 3


def test_relation_heads_by_default_are_the_teachers_or_the_next_that_divide() -> None:
    assert LayerMatcher(LayerLosses(relations=1.0), shape(), shape()).relation_heads == 4
    assert LayerMatcher(LayerLosses(relations=1.0), shape(2, 12, 3), shape()).relation_heads == 4
    assert LayerMatcher(LayerLosses(relations=1.0), shape(2, 10, 2), shape()).relation_heads == 2


def test_layers_whose_attention_is_gone() -> None:
    pruned, whole = tiny.uneven(tiny.model(layers=3)), tiny.model(layers=3)
    ours, theirs = shape_of(pruned.module), shape_of(whole.module)
    assert LayerMatcher(LayerLosses(relations=1.0), ours, theirs).related == (3, 3)
    assert LayerMatcher(LayerLosses(relations=1.0), Shape(ours.widths, {1: (2, 2, 8)}), theirs).related == (1, 3)
    none = Shape(ours.widths, {})
    with pytest.raises(InputError, match="student has no attention left"):
        LayerMatcher(LayerLosses(relations=1.0), none, theirs)
    with pytest.raises(InputError, match="teacher has no attention left"):
        LayerMatcher(LayerLosses(relations=1.0), theirs, none)
    with pytest.raises(InputError, match=r"layer 2 of the teacher has no attention left; with it: \[1, 3\]"):
        LayerMatcher(LayerLosses(relations=1.0, teacher_layer=2), theirs, ours)
    with pytest.raises(InputError, match="no two layers"):
        LayerMatcher(LayerLosses(attention=1.0), none, theirs)
    with pytest.raises(InputError, match="every student layer needs attention, and 2 lost it"):
        LayerMatcher(LayerLosses(attention=1.0, layer_map="dynamic"), ours, theirs)
    some_left = Shape(ours.widths, {1: (4, 4, 8), 3: (4, 4, 8)})
    matcher = LayerMatcher(LayerLosses(attention=1.0), some_left, theirs)
    assert matcher.wanted.attention == (1, 3)


def test_a_pruned_student_learns_from_the_whole_teacher() -> None:
    pruned, whole = tiny.uneven(tiny.model(layers=3)), tiny.model(layers=3)
    matcher = LayerMatcher(LayerLosses(hidden=1.0, relations=1.0), shape_of(pruned.module), shape_of(whole.module))
    ids = torch.randint(5, 50, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    with capture(pruned.module) as ours:
        pruned.module(input_ids=ids, attention_mask=mask_of().long())
    with torch.no_grad(), capture(whole.module) as theirs:
        whole.module(input_ids=ids, attention_mask=mask_of().long())
    matcher(ours, theirs, mask_of()).backward()
    grads = [parameter.grad for parameter in pruned.module.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert sum(float(grad.abs().sum()) for grad in grads) > 0
    assert all(parameter.grad is None for parameter in whole.module.parameters())
