"""Sensitivity: what is measured is surgery, what is counted is surgery, intervals by their formula, the page and the command."""

from __future__ import annotations

import html.parser
import json
import random
from itertools import chain

import numpy as np
import on_disk
import pytest
import taggers
import tiny
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from multum import _sensitivity_sample
from multum._sensitivity import sensitivity
from multum._sensitivity_page import figure, layer_rows, least_rows, render
from multum._sensitivity_sample import effect
from multum.cli import app
from multum.core.families import blocks_of, family_of
from multum.core.latency import LatencyTable
from multum.core.profile import profile
from multum.core.surgery import head_size, heads_and_neurons, keep_blocks, keep_heads, keep_neurons
from multum.errors import InputError
from multum.tasks.fill_mask import FillMask
from multum.tasks.text_generation import TextGeneration


@pytest.fixture(scope="module")
def task():
    return tiny.task(n_train=16, n_validation=24)


@pytest.fixture(scope="module")
def table():
    def line(count, slope):
        return {0: 0.0, count: slope * count}

    return LatencyTable(
        base=1.0, attention=line(4, 0.5), attention_last=line(4, 0.25), feed_forward=line(32, 0.1), feed_forward_last=line(32, 0.05)
    )


@pytest.fixture(scope="module")
def found(task, table):
    return sensitivity(tiny.model(), task, samples=24, groups=5, table=table)


def cut_to(model, unit):
    """The model without the unit, by surgery."""
    result = model.copy()
    module, family, number = result.module, family_of(result.module), unit["block"]
    block = blocks_of(module)[number]
    if unit["kind"] == "head":
        keep_heads(block, family, [h for h in range(4) if h != unit["index"]], head_size(module))
    elif unit["kind"] == "neurons":
        keep_neurons(block, family, [n for n in range(32) if n not in unit["neurons"]])
    else:
        keep_blocks(module, [i for i in range(2) if i != number])
    return module


def answers(module, model, task):
    batches = list(task.batches(model, "validation", 24))
    with torch.no_grad():
        logits = torch.cat([module(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])
    return F.log_softmax(logits.double(), -1), torch.cat([b["labels"] for b in batches])


def test_every_unit_is_there_once(found):
    units = [(u["kind"], u["block"], u["index"]) for u in found["units"]]
    wanted = [(kind, b, i) for b in (0, 1) for kind, n in (("head", 4), ("neurons", 5), ("layer", 1)) for i in range(n)]
    assert units == wanted
    for block in (0, 1):
        groups = [u["neurons"] for u in found["units"] if u["kind"] == "neurons" and u["block"] == block]
        assert sorted(chain(*groups)) == list(range(32))


@pytest.mark.parametrize("number", [0, 5, 9, 13, 17, 19])
def test_a_units_worth_is_what_surgery_does_to_the_answers(found, task, number):
    model, unit = tiny.model(), found["units"][number]
    whole, labels = answers(model.module, model, task)
    without, _ = answers(cut_to(model, unit), model, task)
    assert unit["kl"] == pytest.approx(float(F.kl_div(without, whole, log_target=True, reduction="batchmean")), rel=1e-3, abs=1e-7)
    before, after = ((logs.argmax(1) == labels).double().mean() for logs in (whole, without))
    assert found["accuracy"] == pytest.approx(float(before))
    assert unit["drop"] == pytest.approx(100 * float(before - after))
    assert unit["kl_ci95"][0] <= unit["kl"] <= unit["kl_ci95"][1]


@pytest.mark.parametrize("number", [0, 5, 9])
def test_a_units_cost_is_what_surgery_takes_out(found, table, number):
    model, unit, tokens = tiny.model(), found["units"][number], found["tokens"]
    whole, left = profile(model.module), profile(cut_to(model, unit))
    assert unit["parameters"] == whole["parameters"] - left["parameters"]
    macs = [p["macs"]["per_token"] * tokens + p["macs"]["per_token_squared"] * tokens**2 for p in (whole, left)]
    assert unit["macs"] == pytest.approx(macs[0] - macs[1], rel=0.01)  # tokens are noted with one decimal
    rest = {"head": (3, 32), "neurons": (4, 32 - len(unit.get("neurons", ()))), "layer": (0, 0)}[unit["kind"]]
    assert unit["time"] == pytest.approx(table.total([(4, 32)] * 2) - table.total([rest, (4, 32)]))
    assert found["unit"] == "ms"


def test_the_slope_of_a_gate_that_nothing_passes_is_zero_and_its_group_is_the_first(task):
    model = tiny.model()
    down = blocks_of(model.module)[1].get_submodule(family_of(model.module).down)
    with torch.no_grad():
        down.weight[:, 3:9] = 0.0
    found = sensitivity(model, task, samples=24, groups=16)
    first = [u for u in found["units"] if u["kind"] == "neurons" and u["block"] == 1][:3]
    assert sorted(chain(*(u["neurons"] for u in first))) == list(range(3, 9))
    assert all(u["slope"] == u["kl"] == u["drop"] == 0.0 for u in first)
    assert all(u["time"] is None for u in found["units"])


def test_the_same_seed_gives_the_same_numbers_and_progress_ends_at_one(task):
    from multum.core.reporting import listening

    seen, said = [], []
    with listening(seen.append):
        one = sensitivity(tiny.model(), task, samples=10, groups=2, seed=3, announce=lambda n, s: said.append((n, s)))
    two = sensitivity(tiny.model(), task, samples=10, groups=2, seed=3)
    assert one["units"] == two["units"]
    assert one["units"] != sensitivity(tiny.model(), task, samples=10, groups=2, seed=4)["units"]
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert said[0][0] == len(one["units"]) == 14
    assert said[0][1] > 0


def test_the_interval_of_matched_pairs():
    """b = 3 lost, c = 1 won of 40: (b - c) / (n + 2) ± 1.96 sqrt(b + c + 1 - (b - c)² / (n + 2)) / (n + 2)."""
    labels = torch.zeros(40, dtype=torch.long)
    right, wrong = torch.tensor([0.9, 0.1]).double().log(), torch.tensor([0.1, 0.9]).double().log()
    whole, without = right.repeat(40, 1), right.repeat(40, 1)
    without[:3], whole[3] = wrong, wrong
    found = effect(whole, without, labels)
    assert found["drop"] == pytest.approx(5.0)
    spread = 1.959964 * (5 - 4 / 42) ** 0.5 / 42
    assert found["drop_ci95"] == pytest.approx([100 * (2 / 42 - spread), 100 * (2 / 42 + spread)])
    each = np.array([0.8 * np.log(9)] * 4 + [0.0] * 36)
    assert found["kl"] == pytest.approx(each.mean())
    assert found["kl_ci95"][1] == pytest.approx(each.mean() + 1.959964 * each.std() / 40**0.5)
    nothing = effect(whole, whole, labels)
    assert nothing["kl"] == nothing["drop"] == 0.0
    assert nothing["drop_ci95"][0] < 0 < nothing["drop_ci95"][1]


def test_rows_without_a_label_count_for_the_kl_alone():
    logs = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).double().log()
    found = effect(logs, logs.flip(1), torch.tensor([0, -100]))
    assert found["drop"] == 100.0
    assert found["kl"] == pytest.approx(0.8 * np.log(9))


def test_what_cannot_be_measured_is_refused(task):
    with pytest.raises(InputError) as caught:
        sensitivity(tiny.model(), task, samples=0, groups=0)
    assert len(caught.value.problems) == 2
    untrained = tiny.model()
    untrained.new_weights = ("classifier.weight",)
    with pytest.raises(InputError, match="fine-tune it first"):
        sensitivity(untrained, task)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_language_model_is_asked_for_the_next_token_and_a_few_have_logits_at_once(family, monkeypatch):
    """Against one text at a time through the whole model and surgery; the last token of a text is asked for nothing."""
    monkeypatch.setattr(_sensitivity_sample, "ROWS", 7)
    model = tiny.language_model(family)
    kind = FillMask if family == "bert" else TextGeneration
    task = kind.from_splits(tiny.text_splits(4, 6, 4))
    found = sensitivity(model, task, samples=4, groups=2, seed=1)
    rows = task.encode(model, "validation")
    chosen = [rows[i] for i in random.Random(1).sample(range(len(rows)), 4)]

    def asked(module):
        logs, labels = [], []
        for row in chosen:
            with torch.no_grad():
                out = module(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            wanted = torch.tensor(row["labels"])
            logs.append(out if family == "bert" else out[:-1])
            labels.append(wanted if family == "bert" else wanted[1:])
        logs, labels = torch.cat(logs), torch.cat(labels)
        return logs[labels >= 0].argmax(1) == labels[labels >= 0]

    assert found["accuracy"] == pytest.approx(float(asked(model.module).double().mean()))
    assert found["n"] == len(asked(model.module))
    for unit in (found["units"][0], found["units"][-2]):
        cut = model.copy()
        block, row = blocks_of(cut.module)[unit["block"]], family_of(cut.module)
        if unit["kind"] == "head":
            left = [h for h in range(heads_and_neurons(cut.module)[0][0]) if h != unit["index"]]
            keep_heads(block, row, left, head_size(cut.module))
        else:
            keep_neurons(block, row, [n for n in range(48) if n not in unit["neurons"]])
        lost = asked(model.module).double().mean() - asked(cut.module).double().mean()
        assert unit["drop"] == pytest.approx(100 * float(lost))


def test_spans_are_refused_in_one_sentence():
    with pytest.raises(InputError, match="question-answering is none such") as caught:
        sensitivity(taggers.answerer("bert"), taggers.answering())
    assert len(caught.value.problems) == 1


# -- the page --------------------------------------------------------------------------------------------------------------


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.text = 0, [], []

    def handle_starttag(self, tag, attributes):
        self.images += tag == "svg"
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data.strip())


def test_the_page_shows_every_figure_and_needs_nothing_else(found):
    page = _Page()
    page.feed(render({**found, "model": "<b>mine</b>"}))
    assert page.images == 4
    assert page.links == []
    assert "<b>mine</b> · text-classification" in page.text  # as text, not as a tag
    for unit in found["units"]:
        if unit["kind"] == "layer":
            assert f"{unit['parameters']:,}" in page.text
        else:
            assert figure(1000 * unit["kl"]) in page.text


def test_tables_have_a_row_for_what_they_name(found):
    layers, least = layer_rows(found), least_rows(found)
    assert [row[0] for row in layers[1:]] == ["0", "1"]
    assert len({len(row) for row in [*layers, *least]}) == 1
    best = min((u for u in found["units"] if u["kind"] != "layer"), key=lambda u: u["kl"] / u["macs"])
    assert f"block {best['block']}" in least[1][0]
    assert [figure(v) for v in (0.0, 0.049, 0.25, 9.96, 87.4, 999.6, 12345)] == ["0", "0", "0.2", "10", "87", "1.0k", "12.3k"]


# -- the command -----------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_and_prints_tables(tmp_path):
    model = on_disk.model_folder(tmp_path / "model")
    data = on_disk.review_folder(tmp_path / "data", n_train=16, n_validation=16, n_test=8)
    arguments = [
        "sensitivity",
        str(model),
        "--data",
        str(data),
        "--task",
        "text-classification",
        "--groups",
        "2",
        "--samples",
        "12",
    ]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "layer left out" in done.stdout
    assert "14 units to leave out one at a time; about" in done.stderr
    assert on_disk.listing(tmp_path / "out") == ["sensitivity.html", "sensitivity.json"]
    written = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert written["examples"] == 12
    printed = CliRunner().invoke(app, [*arguments, "--json", "--pictures", str(tmp_path / "pictures")])
    assert json.loads(printed.stdout)["units"] == written["units"]
    assert on_disk.listing(tmp_path / "pictures") == ["heads.png", "heads.svg", "neurons.png", "neurons.svg"]
    drawn = (tmp_path / "pictures" / "heads.svg").read_text()
    assert all(figure(1000 * unit["kl"]) in drawn for unit in written["units"] if unit["kind"] == "head")
    assert "the more the darker" in drawn


def test_wrong_arguments_are_all_named(tmp_path):
    data = on_disk.review_folder(tmp_path / "data", n_train=16, n_validation=16, n_test=8)
    (tmp_path / "table.json").write_text("{}")
    arguments = ["nowhere/at/all", "--data", str(data), "--task", "text-classification", "--samples", "0"]
    more = [
        "--pictures",
        str(tmp_path / "table.json"),
        "--groups",
        "0",
        "--latency-table",
        str(tmp_path / "table.json"),
        "-o",
        str(data),
    ]
    done = CliRunner().invoke(app, ["sensitivity", *arguments, *more])
    assert done.exit_code == 2
    for part in (
        "nowhere/at/all",
        "table.json is a file; give a folder",
        "--samples must be",
        "--groups must be",
        "no latency table",
        "exists already",
    ):
        assert part in done.stderr
