"""Rollout against loops and closed forms; conductances against completeness, integrated gradients and captum; depths planted."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import on_disk
import pytest
import tiny
import tiny_families
import torch
from captum.attr import LayerConductance

from multum._compare import compare
from multum._compare_attribution import Attributor
from multum._compare_charts import depth_chart
from multum._compare_depths import depths as depths_said
from multum._compare_depths import led
from multum._compare_depths import rollout as rollout_said
from multum._compare_inside import Insider, depth_figures, inside_figures, rollout_figures, rollout_shares
from multum._compare_look import LEVELS
from multum._compare_page import summary
from multum._compare_work import Work
from multum.core.families import blocks_of
from multum.evidence._attentions import attentions
from multum.evidence._conductance import _conductances, word_conductances
from multum.evidence._gradients import encoded, margin, word_attributions
from multum.evidence.attribution import spearman
from multum.evidence.depths import depth_agreement, rank_correlations
from multum.evidence.rollout import mixed, rollout

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "the wonderful film was really quite moving"
DRAWING = {"draws": 20, "seed": 0}


def random_attention(rng, heads, tokens):
    scores = np.exp(rng.normal(size=(heads, tokens, tokens)))
    return scores / scores.sum(axis=-1, keepdims=True)


# -- rollout -----------------------------------------------------------------------------------------------------------------


def slow_rollout(blocks, read):
    """Matrices multiplied element by element, from the definition."""
    tokens = len(read)
    whole = [[float(i == j) for j in range(tokens)] for i in range(tokens)]
    for block in blocks:
        bar = [[0.0] * tokens for _ in range(tokens)]
        for i in range(tokens):
            for j in range(tokens):
                attended = sum(head[i][j] for head in block) / len(block) if block is not None else float(i == j)
                bar[i][j] = 0.5 * attended + 0.5 * (i == j)
            bar[i] = [value / sum(bar[i]) for value in bar[i]]
        whole = [[sum(bar[i][k] * whole[k][j] for k in range(tokens)) for j in range(tokens)] for i in range(tokens)]
    return [sum(read[i] * whole[i][j] for i in range(tokens)) for j in range(tokens)]


def test_rollout_is_the_product_of_the_definition():
    rng = np.random.default_rng(0)
    blocks = [random_attention(rng, 2, 5), random_attention(rng, 3, 5), None, random_attention(rng, 1, 5)]
    for read in (np.eye(5)[0], np.eye(5)[-1], np.full(5, 0.2)):
        np.testing.assert_allclose(rollout(blocks, read), slow_rollout(blocks, read), atol=1e-12)
    swapped = rollout(blocks[::-1], np.eye(5)[0])
    assert not np.allclose(swapped, rollout(blocks, np.eye(5)[0]))  # the order of the blocks counts


def test_rollout_where_it_is_known():
    tokens, first = 6, np.eye(6)[0]
    even = np.full((4, tokens, tokens), 1 / tokens)
    np.testing.assert_allclose(rollout([even], first), 0.5 * first + 0.5 / tokens)
    # (½ I + ½ J/n)^L = 2^−L I + (1 − 2^−L) J/n, because J/n is a projection
    np.testing.assert_allclose(rollout([even] * 5, first), 2.0**-5 * first + (1 - 2.0**-5) / tokens)
    alone = np.tile(np.eye(tokens), (4, 1, 1))
    np.testing.assert_array_equal(rollout([alone] * 3, first), first)
    rng = np.random.default_rng(1)
    a, b = random_attention(rng, 2, tokens), random_attention(rng, 2, tokens)
    np.testing.assert_allclose(rollout([a, None, b], first), rollout([a, alone, b], first))
    np.testing.assert_array_equal(rollout([None, None], first), first)
    assert rollout([a, b, even], first).sum() == pytest.approx(1)


def test_rows_that_do_not_sum_to_one_are_normalized():
    bar = mixed(np.array([[[0.2, 0.2], [0.0, 1.0]]]))
    np.testing.assert_allclose(bar, [[0.6 / 0.7, 0.1 / 0.7], [0.0, 1.0]])


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "modernbert", "gpt2", "llama", "mistral", "gemma"])
def test_attention_of_a_model_is_what_its_eager_form_says(family):
    """Captured under sdpa, where transformers gives none, against transformers' own under eager attention."""
    model = tiny.model(family, layers=3, seed=1)
    row = encoded(model, TEXT, 64)
    assert model.module.config._attn_implementation == "sdpa"
    seen = attentions(model, row)
    assert model.module.config._attn_implementation == "sdpa"
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model.module(input_ids=row.ids, **row.rest, output_attentions=True).attentions
    assert len(theirs) == 3
    for ours, eager in zip(seen.blocks, theirs, strict=True):
        np.testing.assert_allclose(ours, eager[0].double().numpy(), atol=1e-5)
    causal = family in tiny_families.DECODERS
    assert seen.read.tolist() == np.eye(row.ids.shape[1])[-1 if causal else 0].tolist()


def test_an_attention_that_was_pruned_away_moves_nothing():
    model = tiny.uneven(tiny.model(layers=3))
    row = encoded(model, TEXT, 64)
    seen = attentions(model, row)
    assert [None if block is None else len(block) for block in seen.blocks] == [2, None, 3]
    alone = [np.eye(len(seen.read))[None] if block is None else block for block in seen.blocks]
    np.testing.assert_allclose(rollout(seen.blocks, seen.read), rollout(alone, seen.read))


def test_a_head_that_reads_all_tokens_leads_from_all():
    model = tiny.model("modernbert")
    model.module.config.classifier_pooling = "mean"
    seen = attentions(model, encoded(model, TEXT, 64))
    assert seen.read == pytest.approx(np.full(len(seen.read), 1 / len(seen.read)))


# -- conductance -------------------------------------------------------------------------------------------------------------


def gained(model, row):
    """F of the text less F of nothing, each by one plain forward pass."""
    with torch.no_grad():
        y = model.module(input_ids=row.ids, **row.rest).logits.argmax(dim=1)
        full, bare = (margin(model.module, ids, row.rest, y) for ids in (row.ids, row.blank))
    return float(full - bare)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny_families.FAMILIES])
def test_every_depth_adds_up_to_what_the_answer_gained(family):
    model = tiny.model(family, layers=3, seed=3)
    row = encoded(model, TEXT, 64)
    found, difference = _conductances(model.module, row, 300)
    assert found.shape == (4, row.ids.shape[1])
    assert difference == pytest.approx(gained(model, row), rel=1e-3, abs=1e-3)
    scale = max(abs(difference), 0.05 * np.abs(found).sum(axis=1).max())
    np.testing.assert_allclose(found.sum(axis=1), difference, atol=0.03 * scale)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "modernbert"])
def test_in_front_of_the_blocks_they_are_the_integrated_gradients(family):
    model = tiny.model(family, seed=3)
    (values,), _, _ = word_attributions(model, [TEXT], max_length=64, steps=200)
    (found,) = word_conductances(model, [TEXT], max_length=64, steps=400)
    np.testing.assert_allclose(found.words[0], values, atol=0.02 * np.abs(values).max())


def test_they_are_captums_layer_conductance():
    model = tiny.model(layers=3, seed=2)
    row, module = encoded(model, TEXT, 64), model.module
    ours, _ = _conductances(module, row, 400)
    table = module.get_input_embeddings()
    with torch.no_grad():
        y = module(input_ids=row.ids, **row.rest).logits.argmax(dim=1)

    def answer(embedded):
        mask = row.rest["attention_mask"].expand(len(embedded), -1)
        logits = module(inputs_embeds=embedded, attention_mask=mask).logits
        return logits[:, y[0]] - logits[:, 1 - y[0]]

    for depth, block in enumerate(blocks_of(module), start=1):
        theirs = LayerConductance(answer, block).attribute(
            table(row.ids).detach(), baselines=table(row.blank).detach(), n_steps=800, method="riemann_trapezoid"
        )
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        expected = theirs.detach().sum(dim=-1)[0].double().numpy()
        np.testing.assert_allclose(ours[depth], expected, atol=0.02 * np.abs(ours).max())


def test_behind_the_last_block_all_of_it_is_on_the_token_that_is_read():
    model = tiny.model(layers=2)
    (found,) = word_conductances(model, [TEXT], max_length=64, steps=4)
    assert found.words.shape == (3, 7)
    assert found.share[0] == pytest.approx(1)  # special tokens are the same on the whole path
    assert 0 < found.share[1] < 1
    assert found.share[2] == 0
    assert (found.words[2] == 0).all()


def test_words_behind_the_cut_have_no_conductance():
    (found,) = word_conductances(tiny.model(), [TEXT], max_length=5, steps=2)
    assert np.isfinite(found.words).tolist() == [[True] * 3 + [False] * 4] * 3


# -- depth by depth ----------------------------------------------------------------------------------------------------------


def test_all_pairs_at_once_are_spearman_of_each():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (3, 9)).astype(float), rng.integers(0, 5, (2, 9)).astype(float)
    found = rank_correlations(a, b)
    for i in range(3):
        for j in range(2):
            assert found[i, j] == pytest.approx(spearman(a[i], b[j]))
    assert np.isnan(rank_correlations(a, np.zeros((1, 9)))).all()


def test_a_depth_finds_the_one_that_it_was_made_of():
    """The model after is made of depths 0, 2 and 5 of the model before, its last depth says nothing."""
    rng, kept = np.random.default_rng(0), [0, 2, 5]
    before = [rng.normal(size=(7, 12)) for _ in range(30)]
    after = [np.concatenate([values[kept] + 0.1 * rng.normal(size=(3, 12)), np.zeros((1, 12))]) for values in before]
    before[3][:, 4] = np.nan
    answers = np.zeros(30, dtype=int)
    other = answers.copy()
    other[:5] = 1
    found = depth_agreement(before, after, answers, other, **DRAWING)
    assert found["n"] == 25
    assert [(row["after"], row["before"]) for row in found["nearest"]] == list(enumerate(kept))
    assert all(row["value"] > 0.9 and row["ci95"][0] <= row["value"] <= row["ci95"][1] for row in found["nearest"])
    assert (len(found["rho"]), len(found["rho"][0])) == (7, 4)
    assert [row[3] for row in found["rho"]] == [None] * 7
    mean = np.mean([spearman(before[at][4], after[at][1]) for at in range(5, 30)])
    assert found["rho"][4][1] == pytest.approx(mean)
    assert depth_agreement(before, after, answers, answers + 1, **DRAWING) is None
    chart = depth_chart(found, width=300)
    figures = {f"{100 * value:.0f}".replace("-", "−") for row in found["rho"] for value in row if value is not None}
    assert figures <= set(re.findall(r">([−\d]+)</text>", chart))  # not colour alone


def test_with_itself_every_depth_agrees_wholly():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(4, 8)) for _ in range(5)]
    answers = np.arange(5) % 2
    found = depth_agreement(values, values, answers, answers, **DRAWING)
    assert np.diag(found["rho"]) == pytest.approx(np.ones(4))
    assert [row["before"] for row in found["nearest"]] == [0, 1, 2, 3]


# -- both, of models on disk -------------------------------------------------------------------------------------------------


def looked(tmp_path, model, name):
    """Answers, and the inside, of a model on the first texts of a task."""
    model.save(tmp_path / name)
    task = tiny.task()
    texts = [text for text in task.inputs("test") if len(text.split()) > 4][:12]
    attributor = Attributor(tmp_path / name, task, texts, 2, 0)
    work = Work(tmp_path / f"{name}-out", {})
    return attributor.run(work, "attribution"), Insider(attributor, task, 4).run(work, "layer")


def test_a_pruned_model_of_other_depth_beside_its_original(tmp_path):
    first, before = looked(tmp_path, tiny.model(layers=4, seed=1), "before")
    second, after = looked(tmp_path, tiny.uneven(tiny.model(layers=3, seed=1)), "after")
    second = replace(second, answers=first.answers)  # whatever two random models answer
    assert [len(before.depths), before.depths[0].shape[0], after.depths[0].shape[0]] == [12, 5, 4]
    found = depth_figures(before, after, (first, second), **DRAWING)
    assert (len(found["rho"]), len(found["rho"][0])) == (5, 4)
    assert [row["after"] for row in found["nearest"]] == [0, 1, 2]
    led_to = rollout_figures(before, after, (first, second), **DRAWING)
    assert -1 <= led_to["rank"]["value"] <= 1
    alone = inside_figures(after, second, **DRAWING)
    assert len(alone["depths"]["words"]) == len(alone["depths"]["error"]) == 4
    assert -1 <= alone["rollout"]["with_gradients"]["rank"]["value"] <= 1
    assert sum(rollout_shares(after, 0)) == pytest.approx(1, abs=0.01)
    same = depth_figures(before, before, (first, first), **DRAWING)
    assert np.diag(same["rho"])[:4].astype(float) == pytest.approx(np.ones(4))
    assert rollout_figures(before, before, (first, first), **DRAWING)["rank"]["value"] == pytest.approx(1)


def test_a_model_whose_attention_cannot_be_seen_has_its_layers_all_the_same(tmp_path):
    first, before = looked(tmp_path, tiny.model("mpnet", seed=1), "before")
    assert before.rollout == []
    assert before.depths[0].shape[0] == 3
    alone = inside_figures(before, first, **DRAWING)
    assert alone["rollout"] is None
    assert rollout_figures(before, before, (first, first), **DRAWING) is None
    assert rollout_shares(before, 0) is None
    result = {"models": {"before": {"inside": alone}, "after": {"inside": alone}}, "comparisons": {"after": {"rollout": None}}}
    said = rollout_said(result, {"before": "before", "after": "after"})
    assert said == {"said": "", "blind": "before and after"}


def test_compare_shows_both_on_its_page(tmp_path, monkeypatch):
    less = replace(LEVELS["full"], draws=50, perturbed=1, attributed=6, points=2, steps=3)
    monkeypatch.setitem(LEVELS, "full", less)
    splits = tiny.splits(30, 30, 40)
    for name in ("train", "validation", "test"):
        on_disk.write_csv(tmp_path / "data" / f"{name}.csv", getattr(splits, name).to_list())
    original = tiny.model(layers=4, seed=1)
    original.save(tmp_path / "before")
    tiny.uneven(original).save(tmp_path / "after")
    where = {"data": str(tmp_path / "data"), "task": "text-classification", "level": "full", "threads": 1}
    result = compare(tmp_path / "before", tmp_path / "after", floor=tmp_path / "before", output=tmp_path / "out", **where)
    floor, after = (result["comparisons"][role] for role in ("floor", "after"))
    assert [row[at] for at, row in enumerate(floor["depths"]["rho"])][:4] == pytest.approx([1] * 4)
    assert floor["rollout"]["rank"]["value"] == pytest.approx(1)
    assert floor["depths"]["n"] == 6
    assert after["depths"]["n"] <= after["attribution"]["alike"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('aria-label="How alike words are ranked at every pair of depths') == 2  # wide and narrow
    assert "the mean of those ρ is" in page
    assert "Attention leads to words in both models alike to ρ" in page
    assert "Behind block 4 of the model after nothing stands on words" in page
    assert page.count("attention rollout</span>") == 2 * len(after["attribution"]["examples"])
    assert {"Likest depths, mean", "Rank agreement of attention rollout"} <= {row[0] for row in summary(result)}


# -- in words ----------------------------------------------------------------------------------------------------------------


def test_what_is_said_of_depths():
    row = {"value": 0.5, "ci95": [0.4, 0.6]}
    found = {
        "n": 9,
        "rho": [[1.0, None], [0.2, None]],
        "nearest": [{"after": 0, "before": 0, **row}, {"after": 1, "before": 3, **row, "value": -0.7, "ci95": [-0.8, -0.6]}],
    }
    own_figures = {"inside": {"depths": {"words": [1.0, 0.4, 0.0], "error": [0.01, 0.02, 0.0]}}}
    result = {
        "models": {"before": own_figures, "after": own_figures},
        "comparisons": {"after": {"depths": found}, "floor": {"depths": found}},
        "attributed": {"steps": 20},
    }
    said = depths_said(result)
    assert "the mean of those ρ is −0.10" in said["said"]
    assert "For block 1, the last of the model after where words still count, that is block 3" in said["said"]
    assert "(ρ = −0.70 (−0.80 to −0.60))" in said["said"]
    assert "two trainings" in said["said"]
    assert [row["before"] for row in said["rows"]] == ["the embeddings", "block 3"]
    assert said["rows"][1]["words"].startswith("40.0")
    assert said["silent"].startswith("Behind block 2 of the model after nothing stands on words")
    assert said["error"] == 0.02
    assert depths_said({"comparisons": {"after": {}}}) is None


def test_words_are_marked_that_get_more_than_an_even_share():
    assert led([0.5, 0.1, None, 0.3, 0.1]) == [1.0, None, None, pytest.approx(0.2), None]
    assert led([0.25] * 4) == [None] * 4
    assert led([None, None]) == [None, None]
