"""Structured pruning of encoder-decoders: sublayers, costs, prices, choices, repair, each against a slow or exact way."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import translators
from tiny_encoder_decoders import MADE, ODD, batch, model
from torch.nn import functional as F

from multum._sensitivity import sensitivity
from multum._sensitivity_page import render
from multum.core.blocks import each_output, mean_lengths, walk_blocks
from multum.core.families import stacks_of
from multum.core.gates import place_gradients
from multum.core.linears import is_linear, matrix
from multum.core.model import Model
from multum.core.profile import profile
from multum.core.sublayers import CROSS, NEURONS, places_of, unit_macs, units_of
from multum.core.surgery import head_size
from multum.errors import InputError
from multum.steps._price import Price
from multum.steps._units import Costs, cheapest, costs_of, most_important
from multum.steps.drop_layers import DropLayers
from multum.steps.fisher_masks import FisherMasks
from multum.steps.prune_structured import PruneStructured, price_sublayers
from multum.steps.reconstruct import Reconstruct, teacher_blocks

pytestmark = pytest.mark.usefixtures("one_thread")
every_model = pytest.mark.parametrize("name", [*MADE, *ODD])
FAMILIES = pytest.mark.parametrize("family", translators.FAMILIES)


@pytest.fixture(scope="module")
def task() -> Any:
    return translators.translating(32, 8)


def padded() -> dict[str, torch.Tensor]:
    """Of other lengths on either side, the decoder's padding with nothing to mark it but the token."""
    inputs = batch()
    inputs["decoder_input_ids"][2, 4:] = 0
    inputs["decoder_input_ids"][:, 0] = 0
    return inputs


@torch.no_grad()
def test_padding_of_the_decoder_is_told_by_its_token() -> None:
    module = model("t5")
    block = list(walk_blocks(module, [padded()]))[-1]
    wanted = torch.ones(4, 6, dtype=torch.bool)
    wanted[2, 4:] = False
    assert torch.equal(block.masks[0], wanted)
    assert mean_lengths(module, [padded()]) == [8, 6]  # (9 + 5 + 9 + 9) / 4 and (6 + 6 + 4 + 6) / 4


@every_model
def test_macs_of_a_unit_are_what_the_profile_loses(name: str) -> None:
    module, read, written = model(name), 7, 5

    def total(one: Any) -> float:
        macs = profile(one)["macs"]
        found = macs["per_token"] * read + macs["per_token_squared"] * read**2 + macs["per_token_pair"] * read * written
        return found + macs["per_target_token"] * written + macs["per_target_token_squared"] * written**2

    for place, other in zip(places_of(module), places_of(copy.deepcopy(module)), strict=True):
        cut = copy.deepcopy(module)
        there = next(p for p in places_of(cut) if (p.number, p.sublayer.kind) == (other.number, other.sublayer.kind))
        there.sublayer.keep(there.block, list(range(place.size))[1:], head_size(cut, there.stack.family))
        assert total(module) - total(cut) == unit_macs(module, place, read, written)
        assert there.size == place.size - 1
    costs = costs_of(module, [padded()])
    assert costs.of(units_of(module)) == costs.total
    assert costs.of([[0] * len(counts) for counts in units_of(module)]) > 0


@torch.no_grad()
@every_model
def test_answers_are_the_same_from_any_block_on(name: str) -> None:
    """And with a sublayer changed they are those of the whole changed model."""
    module, data = model(name), [padded(), batch()]
    head = module.get_output_embeddings()
    for block in walk_blocks(module, data):
        linear = block.module.get_submodule(
            places_of(module)[0].sublayer.path if block.index < 3 else stacks_of(module)[1].family.down
        )
        before = linear.weight.data.clone()
        linear.weight.data *= 0.7
        plain = list(each_output(module, None, data, [0, 1]))
        for ours, wanted in zip(each_output(module, block, data, [0, 1]), plain, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        flows = [next(each_output(module, at, data, [1], before=head)) for at in (None, block)]
        torch.testing.assert_close(*flows, rtol=1e-5, atol=1e-5)
        linear.weight.data = before
    assert len(plain[0]) == 22  # real tokens of the decoder


@torch.no_grad()
@pytest.mark.parametrize("name", ["marian", "t5"])
def test_a_price_is_the_divergence_of_the_models_own_answers(name: str) -> None:
    module, data = model(name), [padded()]
    if name == "marian":
        module.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    whole = module(**data[0]).logits.double().log_softmax(-1)
    price = Price(module, data)
    mask = list(walk_blocks(module, data))[-1].masks[0]
    for block in walk_blocks(module, data):
        place = next(p for p in places_of(module) if p.number == block.index and p.sublayer.kind == NEURONS)
        linear = block.module.get_submodule(place.sublayer.path)
        before = linear.weight.data.clone()
        linear.weight.data *= 0.0
        found = module(**data[0]).logits.double().log_softmax(-1)
        wanted = F.kl_div(found[mask], whole[mask], log_target=True, reduction="batchmean")
        assert price(block) == pytest.approx(float(wanted), rel=1e-3, abs=2e-7)
        linear.weight.data = before


def test_the_counts_chosen_are_the_cheapest_of_all() -> None:
    """Against every combination, with costs that fall on whole steps of the cost axis."""
    made = np.random.default_rng(0)
    for _ in range(20):
        prices = []
        for units in made.integers(1, 4, 4):
            values = np.sort(made.random(units))[::-1].tolist()
            prices.append({**dict(enumerate(values)), int(units): 0.0})
        costs, room = made.integers(1, 6, 4).tolist(), 16
        best = min(
            sum(price[n] for price, n in zip(prices, counts, strict=True))
            for counts in itertools.product(*prices)
            if sum(cost * n for cost, n in zip(costs, counts, strict=True)) <= room
        )
        chosen = cheapest(prices, costs, room)
        assert sum(cost * n for cost, n in zip(costs, chosen, strict=True)) <= room
        assert sum(price[n] for price, n in zip(prices, chosen, strict=True)) == pytest.approx(best)


def test_the_most_important_units_are_within_one_of_the_optimum() -> None:
    made = np.random.default_rng(1)
    for _ in range(20):
        scores, costs, room = [made.random(4) for _ in range(3)], made.integers(1, 5, 3).tolist(), 14.0
        kept = most_important(scores, costs, room)
        units = [(float(worth), cost) for each, cost in zip(scores, costs, strict=True) for worth in each]
        best = max(
            sum(worth for worth, _ in some)
            for count in range(len(units) + 1)
            for some in itertools.combinations(units, count)
            if sum(cost for _, cost in some) <= room
        )
        ours = sum(float(each[u]) for each, us in zip(scores, kept, strict=True) for u in us)
        used = sum(cost * len(us) for cost, us in zip(costs, kept, strict=True))
        assert used <= room
        assert best - max(worth for worth, _ in units) <= ours <= best + 1e-9
        assert all(cost > room - used for cost, us in zip(costs, kept, strict=True) if len(us) < 4)


@pytest.mark.parametrize(("name", "step", "near"), [("bart", 1e-5, 1e-3), ("mbart", 1e-5, 1e-3), ("t5", 3e-3, 3e-2)])
def test_gradients_of_gates_are_those_of_differences(name: str, step: float, near: float) -> None:
    """T5 norms in single precision whatever it is given."""
    module, data = model(name).double(), padded()
    labels = torch.randint(3, 60, data["decoder_input_ids"].shape, generator=torch.Generator().manual_seed(2))

    def loss(outputs: Any, found: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.logits.flatten(0, 1), found["labels"].flatten())

    (slopes,) = place_gradients(module, [{**data, "labels": labels}], loss)
    assert [len(each) for each in slopes] == [place.size for place in places_of(module)]
    for place, slope in list(zip(places_of(module), slopes, strict=True))[::2]:
        linear, values = place.block.get_submodule(place.sublayer.path), []
        columns = place.sublayer.features([1])
        for sign in (1, -1):
            before = linear.weight.data.clone()
            matrix(linear).data[:, columns] *= 1 + sign * step
            with torch.no_grad():
                values.append(float(loss(module(**data), {"labels": labels})))
            linear.weight.data = before
        assert float(slope[1]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=near, abs=1e-8)


@FAMILIES
@pytest.mark.parametrize(
    "step",
    [PruneStructured(speedup=1.6, samples=16, neuron_group=4), FisherMasks(speedup=1.6, samples=16, batch_size=4)],
    ids=["prune_structured", "fisher_masks"],
)
def test_both_stacks_are_cut_to_the_budget_reload_and_write(family: str, step: Any, task: Any, tmp_path: Path) -> None:
    whole = translators.translator(family, layers=2, spread=2.0)
    made = step(whole, task)
    notes, batches = made.history[-1], task.calibration(whole, 16)
    costs = costs_of(whole.module, batches)
    assert notes["predicted"][0] == costs.total
    assert notes["predicted"][1] == pytest.approx(costs_of(made.module, batches).total)
    assert 0.8 * costs.total / 1.6 < notes["predicted"][1] <= costs.total / 1.6
    assert notes["blocks"] == [units_of(whole.module), units_of(made.module)]
    assert sorted([*notes["changed"], *notes["skipped"]]) == sorted(whole.linears())
    made.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", auto_class="AutoModelForSeq2SeqLM")
    for inputs in batches:
        with torch.no_grad():
            assert torch.equal(again.module(**inputs).logits, made.module(**inputs).logits)
        read = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
        written = [each.generate(**read, max_new_tokens=6, num_beams=2, do_sample=False) for each in (again.module, made.module)]
        assert torch.equal(*written)


@torch.no_grad()
def test_repair_brings_both_stacks_nearer_to_the_whole(task: Any) -> None:
    for family in ("marian", "t5"):
        whole = translators.translator(family, layers=2, spread=2.0)
        fields = {"speedup": 2.0, "samples": 32, "neuron_group": 4}
        plain, mended = (PruneStructured(**fields, repair=on)(whole, task) for on in (False, True))
        assert units_of(plain.module) == units_of(mended.module)
        batches = task.calibration(whole, 32)

        def apart(one: Model, other: Model = whole, rows: Any = batches) -> float:
            logs = [[each.module(**row).logits.double().log_softmax(-1).flatten(0, 1) for row in rows] for each in (other, one)]
            return float(F.kl_div(torch.cat(logs[1]), torch.cat(logs[0]), log_target=True, reduction="batchmean"))

        assert apart(mended) < apart(plain)


def test_neurons_without_a_way_out_go_first(task: Any) -> None:
    """Half of all neurons do nothing: nothing is lost by a speed-up that they pay for."""
    whole = translators.translator("marian", layers=2, spread=2.0)
    with torch.no_grad():
        for place in places_of(whole.module):
            if place.sublayer.kind == NEURONS:
                matrix(place.block.get_submodule(place.sublayer.path))[:, ::2] = 0.0
    costs = costs_of(whole.module, task.calibration(whole, 16))
    dead = sum(
        cost * n // 2
        for cost, n, p in zip(costs.units, costs.counts, places_of(whole.module), strict=True)
        if p.sublayer.kind == NEURONS
    )
    speedup = costs.total / (costs.total - 0.9 * dead)
    for step in (
        PruneStructured(speedup=speedup, samples=16, neuron_group=1, repair=False),
        FisherMasks(speedup=speedup, samples=16, batch_size=4, tune=False),
    ):
        made = step(whole, task)
        for inputs in task.calibration(whole, 16):
            with torch.no_grad():
                torch.testing.assert_close(made.module(**inputs).logits, whole.module(**inputs).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_head_that_reads_the_encoder_has_an_order_and_prices(task: Any) -> None:
    whole = translators.translator("bart", layers=2, spread=2.0)
    found = price_sublayers(whole.module, task.calibration(whole, 8), 8)
    assert [len(block) for block in found] == [2, 2, 3, 3]
    kinds = [place.sublayer.kind for place in places_of(whole.module)]
    assert kinds[5] == CROSS
    cross = found[2][1]
    assert cross.order.units == 4
    assert cross.prices[4] == 0 < cross.prices[0]


@FAMILIES
def test_reconstruct_after_heads_and_blocks_were_dropped(family: str, task: Any, tmp_path: Path) -> None:
    whole = translators.translator(family, layers=3, spread=2.0)
    whole.save(tmp_path / "whole")
    whole = Model.load(tmp_path / "whole", auto_class="AutoModelForSeq2SeqLM")
    shorter = DropLayers(which=(1,), stack="decoder")(whole, task)
    cut = PruneStructured(speedup=1.3, samples=16, neuron_group=8, repair=False)(shorter, task)
    assert teacher_blocks(cut, whole) == [0, 1, 2, 3, 5]
    made = Reconstruct(teacher=str(tmp_path / "whole"), samples=32)(cut, task)
    assert made.history[-1]["teacher_blocks"] == [0, 1, 2, 3, 5]
    outputs = [place.block.get_submodule(place.sublayer.path) for place in places_of(cut.module)]
    assert made.history[-1]["repaired"]["dense"] == sum(map(is_linear, outputs))

    @torch.no_grad()
    def streams(one: Model) -> torch.Tensor:
        rows = task.calibration(one, 32)
        return torch.cat([one.module(**row, output_hidden_states=True).decoder_hidden_states[-1].flatten(0, 1) for row in rows])

    wanted = streams(whole)
    assert float((streams(made) - wanted).square().mean()) < float((streams(cut) - wanted).square().mean())


def test_nothing_cut_is_nothing_repaired(task: Any, tmp_path: Path) -> None:
    whole = translators.translator("t5", layers=2)
    whole.save(tmp_path / "whole")
    whole = Model.load(tmp_path / "whole", auto_class="AutoModelForSeq2SeqLM")
    made = Reconstruct(teacher=str(tmp_path / "whole"), samples=8)(whole, task)
    for name, weight in whole.module.state_dict().items():
        torch.testing.assert_close(made.module.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_sensitivity_measures_what_surgery_does_in_both_stacks(family: str, task: Any) -> None:
    whole = translators.translator(family, layers=2, spread=2.0)
    found = sensitivity(whole, task, samples=8, groups=3)
    places = places_of(whole.module)
    assert found["stacks"] == [2, 2]
    assert found["blocks"] == [list(block) for block in units_of(whole.module)]
    kinds = {
        place.sublayer.kind: {"heads": "head", "cross_heads": "cross_head"}.get(place.sublayer.kind, "neurons") for place in places
    }
    wanted = [(kinds[p.sublayer.kind], p.number, i) for p in places for i in range(3 if p.sublayer.kind == NEURONS else p.size)]
    assert [(u["kind"], u["block"], u["index"]) for u in found["units"] if u["kind"] != "layer"] == wanted
    rows = list(task.encode(whole, "validation"))
    assert found["n"] == sum(len(row["labels"]) for row in rows)

    @torch.no_grad()
    def answers(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logs, labels = [], []
        for row in rows:
            batch = {key: torch.tensor([row[key]]) for key in row}
            labels.append(batch.pop("labels")[0])
            logs.append(module(**batch).logits[0].double().log_softmax(-1))
        return torch.cat(logs), torch.cat(labels)

    before, labels = answers(whole.module)
    assert found["accuracy"] == pytest.approx(float((before.argmax(1) == labels).double().mean()))
    for unit in [u for u in found["units"] if u["kind"] != "layer"][::5]:
        cut = copy.deepcopy(whole.module)
        place = next(p for p in places_of(cut) if p.number == unit["block"] and kinds[p.sublayer.kind] == unit["kind"])
        gone = unit.get("neurons", [unit["index"]])
        left = [u for u in range(place.size) if u not in gone]
        place.sublayer.keep(place.block, left, head_size(cut, place.stack.family))
        after, _ = answers(cut)
        assert unit["kl"] == pytest.approx(
            float(F.kl_div(after, before, log_target=True, reduction="batchmean")), rel=2e-3, abs=1e-6
        )
        assert unit["parameters"] == sum(p.numel() for p in whole.module.parameters()) - sum(p.numel() for p in cut.parameters())
        assert unit["macs"] > 0
    page = render({**found, "model": "tiny"})
    assert "Heads that read the encoder" in page
    assert "Blocks 0 to 1 belong to the encoder, 2 to 3 to the decoder." in page


def test_bad_input_is_refused(task: Any, tmp_path: Path) -> None:
    whole = translators.translator("marian", layers=2)
    table = str(tmp_path / "latency.json")
    for step in (PruneStructured(latency_table=table), FisherMasks(latency_table=table)):
        with pytest.raises(InputError, match="models of one stack; leave latency_table out"):
            step(whole, task)
    for step in (PruneStructured(speedup=500.0, samples=8), FisherMasks(speedup=500.0, samples=8)):
        with pytest.raises(InputError, match="ask for less than"):
            step(whole, task)
    other = translators.translator("marian", layers=3)
    other.save(tmp_path / "other")
    with pytest.raises(InputError, match="the model has 2 and 2 blocks and the teacher 3 and 3"):
        Reconstruct(teacher=str(tmp_path / "other"), samples=8)(whole, task)
    assert Costs(10.0, [1, 2], [2, 3]).of([[1], [1]]) == 5.0
