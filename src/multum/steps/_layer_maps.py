r"""Which layer of a student is compared with which of its teacher. Layers count from 1.

    uniform   g(m) = m N/M, rounded                     (TinyBERT, arXiv:1909.10351, section 3.2), M student and N teacher layers
    last      g(M) = N or the layer asked for, no other           (MiniLM, arXiv:2002.10957)
    dynamic   m(n) = argmin MSE(W_h h_m, h_n), ascending          (CoFi, arXiv:2204.00408, section 3.2)
    a list    g(1), ..., g(M)

A student that was made from its teacher by dropping blocks has a better uniform map than the even one: what block m writes is
what the next block that stayed reads, so it is compared with what that one read in the teacher, g(m) = b(m+1) and g(M) = N,
where b(m) counts from 0 which block of the teacher the student's m-th was. Nothing dropped, it is g(m) = m.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from ..core.capture import Shape
from ..core.model import Model

Pairs = list[tuple[int, int]]
"""(student layer, teacher layer)."""
DYNAMIC = 4
"""Teacher layers that `dynamic` matches by default: CoFi's 3, 6, 9 and 12 of 12; fewer where half the student's layers are fewer,
or there would be nothing to choose."""


def evenly(count: int, layers: int) -> list[int]:
    """`count` of `layers` layers, evenly spaced, the last one among them: m N/M, halves rounded up."""
    return [max(1, (2 * m * layers + count) // (2 * count)) for m in range(1, count + 1)]


def layer_pairs(
    layer_map: str | Sequence[int],
    student: int,
    teacher: int,
    teacher_layer: int | None = None,
    dynamic: Sequence[int] | None = None,
    descent: Sequence[int] | None = None,
) -> tuple[Pairs, list[str]]:
    """The pairs of a map, and what is wrong with it for models of so many layers; `dynamic` does not know its student layers: 0.

    Args:
        layer_map: `uniform`, `last`, `dynamic` or one teacher layer per student layer.
        student: M.
        teacher: N.
        teacher_layer: for `last`; None: N.
        dynamic: teacher layers for `dynamic`; None: up to four, evenly spaced.
        descent: b(1), ..., b(M), where known.
    """
    problems = []
    if not isinstance(layer_map, str) and len(layer_map) != student:
        problems.append(f"layer_map names {len(layer_map)} teacher layers, but the student has {student} layers: name one for each")
    if layer_map == "dynamic" and len(dynamic or ()) > student:
        problems.append(f"dynamic_layers names {len(dynamic or ())} teacher layers, but the student has only {student} to match")
    named = {
        "layer_map": [] if isinstance(layer_map, str) else layer_map,
        "teacher_layer": [teacher_layer] if teacher_layer else [],
        "dynamic_layers": dynamic or [],
    }
    for field, layers in named.items():
        if missing := sorted({layer for layer in layers if layer > teacher}):
            problems.append(f"{field}: the teacher has the layers 1 to {teacher}, no {', '.join(map(str, missing))}")
    if student < 1:
        problems.append("the student has no layers to compare")
    if problems:
        return [], problems
    if not isinstance(layer_map, str):
        return list(zip(range(1, student + 1), layer_map, strict=True)), []
    if layer_map == "last":
        return [(student, teacher_layer or teacher)], []
    if layer_map == "dynamic":
        return [(0, layer) for layer in dynamic or evenly(min(DYNAMIC, (student + 1) // 2, teacher), teacher)], []
    chosen = [*descent[1:], teacher] if descent else evenly(student, teacher)
    return list(zip(range(1, student + 1), chosen, strict=True)), []


def descent(student: Model, teacher: Model) -> list[int] | None:
    """Which block of the teacher (from 0) each of the student's was; None if the student was not made from this teacher.

    It was if both began as the same model and the student's history goes on from the teacher's.
    """
    return _descent(student, teacher, "num_hidden_layers", "kept_blocks")


def channel_descent(student: Model, teacher: Model) -> list[int] | None:
    """The same for the channels of the residual stream."""
    return _descent(student, teacher, "hidden_size", "kept_hidden")


def _descent(student: Model, teacher: Model, count: str, kept_in: str) -> list[int] | None:
    """Of what a field of the config counts, and an entry of the history says which were kept."""
    past, since = student.history[: len(teacher.history)], student.history[len(teacher.history) :]
    if student.source != teacher.source or json.dumps(past) != json.dumps(teacher.history):
        return None
    found = list(range(getattr(teacher.module.config, count)))
    for kept in [entry[kept_in] for entry in since if isinstance(entry.get(kept_in), list)]:
        if kept and max(kept) >= len(found):
            return None
        found = [found[number] for number in kept]
    return found if len(found) == getattr(student.module.config, count) else None


def monotone_match(costs: Sequence[Sequence[float]]) -> list[int]:
    """For each row a column, columns ascending, so that the chosen costs have the least sum.

    The paper goes through the rows from the last to the first and takes the cheapest column below the one before; this finds
    the best of all ascending choices.

    Args:
        costs: rows (teacher layers) by columns (student layers, at least as many).
    """
    columns = len(costs[0])
    if len(costs) > columns:
        raise ValueError("more rows than columns")
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (columns + 1)  # over the first so many columns
    for row in costs:
        extended: list[tuple[float, list[int]]] = [(float("inf"), [])]
        for column in range(columns):
            taken = best[column][0] + row[column], [*best[column][1], column]
            extended.append(min(extended[-1], taken, key=lambda choice: choice[0]))
        best = extended
    return best[-1][1]


def attending(pairs: Pairs, student: Shape, teacher: Shape) -> Pairs:
    """The pairs whose layers both still have attention."""
    return [(m, n) for m, n in pairs if m in student.heads and n in teacher.heads]


def attention_problems(pairs: Pairs, student: Shape, teacher: Shape) -> list[str]:
    """Why the attention scores of these pairs cannot be compared head by head. A student layer of 0 may turn out to be any."""
    dynamic = any(m == 0 for m, _ in pairs)
    if dynamic and (gone := sorted(set(range(1, student.layers + 1)) - student.heads.keys())):
        return [f"attention: with a dynamic map every student layer needs attention, and {', '.join(map(str, gone))} lost it"]
    candidates = [(m, n) for _, n in pairs for m in student.heads] if dynamic else pairs
    both = attending(candidates, student, teacher)
    if not both:
        return ["attention: no two layers that are compared both have attention"]
    for m, n in both:
        if student.heads[m][0] != teacher.heads[n][0]:
            return [
                f"attention: scores are compared head by head, but the student's layer {m} has {student.heads[m][0]} heads and the "
                f"teacher's layer {n} has {teacher.heads[n][0]}; use relations, which take any number of heads"
            ]
    return []


def related(student: Shape, teacher: Shape, teacher_layer: int | None, heads: int | None) -> tuple[tuple[int, int], int, list[str]]:
    """The one pair of layers whose relations are compared, into how many relation heads, and what is wrong.

    The student's is its last that attends. The number of heads has to divide the widths of queries, keys and values of both.

    Args:
        teacher_layer: None: its last that attends.
        heads: None: as many as the teacher has heads, or the next smaller number that divides.
    """
    if not student.heads or not teacher.heads:
        which = "teacher" if student.heads else "student"
        return (0, 0), 0, [f"relations: the {which} has no attention left in any layer"]
    ours, theirs = max(student.heads), teacher_layer or max(teacher.heads)
    if theirs not in teacher.heads:
        return (0, 0), 0, [f"teacher_layer: layer {theirs} of the teacher has no attention left; with it: {sorted(teacher.heads)}"]
    widths = [[h * shape.heads[layer][2] for h in shape.heads[layer][:2]] for shape, layer in ((student, ours), (teacher, theirs))]
    common = math.gcd(*widths[0], *widths[1])
    divisors = [number for number in range(1, common + 1) if common % number == 0]
    if heads is None:
        heads = max(number for number in divisors if number <= teacher.heads[theirs][0])
    if heads not in divisors:
        said = [" and ".join(map(str, sorted(set(pair)))) for pair in widths]
        return (
            (0, 0),
            0,
            [
                f"relation_heads must divide the widths of the queries, keys and values, {said[0]} in the student and {said[1]} in "
                f"the teacher: {', '.join(map(str, divisors))} (got {heads})"
            ],
        )
    return (ours, theirs), heads, []
