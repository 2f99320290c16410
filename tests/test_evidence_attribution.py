"""Rank agreement, overlap and the deletion test against slow definitions; integrated gradients against closed forms."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tiny
import torch

from multum._compare_attribution import Attributor, chosen, torch_form, why_not
from multum._compare_work import Work
from multum.core.model import Model
from multum.evidence._gradients import blank_token, word_attributions
from multum.evidence._words import kept_words, words_of
from multum.evidence.attribution import agreement, cuts, deletion, deletions, order, overlap, spearman
from multum.targets import export_to, exporter

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_spearman(a, b):
    """Pearson's correlation of mean ranks, counted one by one."""

    def ranks(values):
        return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]

    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return top / (sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y)) ** 0.5


def test_spearman_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = rng.integers(0, 4, 12).astype(float), rng.integers(0, 5, 12).astype(float)
        assert spearman(a, b) == pytest.approx(slow_spearman(a, b))
    assert spearman(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)
    assert spearman(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_overlap_and_what_chance_would_share():
    a = np.array([5.0, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0])
    assert overlap(a, a) == (1.0, 5 / 12)
    assert overlap(a, -a)[0] == 0.0
    assert overlap(np.array([2.0, 1, 0]), np.array([1.0, 2, 0])) == (0.0, 1 / 3)  # k is half of the words
    rng = np.random.default_rng(0)
    by_chance = np.mean([overlap(rng.random(12), rng.random(12))[0] for _ in range(4000)])
    assert by_chance == pytest.approx(5 / 12, abs=0.01)


def test_agreement_takes_texts_that_both_answer_alike_and_words_that_both_read():
    a = [np.array([3.0, 2, 1, 0]), np.array([1.0, 2, 3, 4]), np.array([1.0, 2]), np.array([4.0, 3, 2, np.nan])]
    b = [np.array([3.0, 2, 1, 0]), -np.array([1.0, 2, 3, 4]), np.array([1.0, 2]), np.array([4.0, 3, 2, 9])]
    found = agreement(a, b, np.array([0, 1, 0, 1]), np.array([0, 0, 0, 1]), draws=50, seed=0)
    assert (found["n"], found["alike"], found["texts"]) == (2, 3, 4)
    assert found["each"] == {0: pytest.approx(1), 3: pytest.approx(1)}
    assert found["rank"]["value"] == pytest.approx(1)
    assert agreement(a[:1], b[:1], np.array([0]), np.array([1]), draws=5, seed=0) is None


def test_deletions_take_out_the_first_words_and_then_leave_them_alone():
    ranking = order(np.array([0.1, 0.9, -0.5, 0.5]))
    assert ranking.tolist() == [1, 3, 0, 2]
    assert cuts(4) == [1, 1, 2]
    left = deletions(ranking)
    assert [mask.tolist() for mask in left[:3]] == [[True, False, True, True]] * 2 + [[True, False, True, False]]
    assert [mask.tolist() for mask in left[3:]] == [[False, True, False, False]] * 2 + [[False, True, False, True]]
    assert cuts(2) == [1, 1, 1]
    assert cuts(40) == [4, 8, 20]


def test_the_deletion_test_of_a_model_that_is_known():
    """A model whose probability is 0.2 plus 0.1 for every good word: what is taken out can be counted."""
    rng = np.random.default_rng(0)
    n, words, good = 200, 20, 4
    whole, guided, by_chance, blind = np.empty(n), [], [], []
    for at in range(n):
        values = np.zeros(words)
        values[rng.permutation(words)[:good]] = 1

        def asked(ranking, values=values):
            return [0.2 + 0.1 * values[mask].sum() for mask in deletions(ranking)]

        whole[at] = 0.2 + 0.1 * good
        guided.append(asked(order(values)))
        by_chance.append([asked(rng.permutation(words)) for _ in range(3)])
        blind.append(asked(rng.permutation(words)))
    found = deletion(whole, np.array(guided), np.array(by_chance), draws=200, seed=0)
    # Out of 20 words 2, 4 and 10 go: 2, 4 and 4 of the good ones, or in a random order a tenth, a fifth and a half of 4.
    assert found["comprehensiveness"]["value"] == pytest.approx(np.mean([0.2, 0.4, 0.4]))
    assert found["comprehensiveness"]["random"] == pytest.approx(0.4 * np.mean([0.1, 0.2, 0.5]), abs=0.01)
    assert found["sufficiency"]["value"] == pytest.approx(np.mean([0.2, 0.0, 0.0]))
    assert found["sufficiency"]["random"] == pytest.approx(0.4 * np.mean([0.9, 0.8, 0.5]), abs=0.01)
    assert found["faithful"]
    assert not deletion(whole, np.array(blind), np.array(by_chance), draws=200, seed=0)["faithful"]


def test_words_do_not_depend_on_tokens():
    text = "It's a well-made film, really! 好电影"
    words = [text[start:end] for _, start, end in words_of(text)]
    assert words == ["It's", "a", "well-made", "film", ",", "really", "!", "好", "电", "影"]
    keep = np.array([True, False, False, True, True, False, True, False, True, True])
    assert kept_words(text, words_of(text), keep) == "It's film, ! 电影"
    pair = ("a film", "a dog")
    assert words_of(pair) == [(0, 0, 1), (0, 2, 6), (1, 0, 1), (1, 2, 5)]
    assert kept_words(pair, words_of(pair), np.array([False, True, True, False])) == ("film", "a")


class Linear(torch.nn.Module):
    """Logits that are a linear function of the embeddings, of which integrated gradients are known exactly."""

    def __init__(self, config, vocabulary, hidden, classes):
        super().__init__()
        self.config = config
        self.words = torch.nn.Embedding(vocabulary, hidden)
        self.head = torch.nn.Linear(hidden, classes, bias=False)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        sums = (self.words(input_ids) * attention_mask[..., None]).sum(dim=1)
        return type("Output", (), {"logits": self.head(sums)})()


@pytest.mark.parametrize("classes", [2, 3])
def test_of_a_linear_model_they_are_its_weights_times_the_embeddings(classes):
    torch.manual_seed(0)
    made = tiny.model()
    linear = Linear(made.module.config, len(made.tokenizer), 8, classes)
    model = Model(module=linear, tokenizer=made.tokenizer, source="linear")
    text = "a wonderful film with dreadful music"
    (values,), (answer,), (error,) = word_attributions(model, [text], max_length=64, steps=4)
    weight = linear.head.weight.detach().double()
    direction = weight[answer] - (weight.sum(dim=0) - weight[answer]) / (classes - 1)
    embedded, mask = linear.words.weight.detach().double(), made.tokenizer.mask_token_id
    for word, value in zip(text.split(), values, strict=True):
        ids = made.tokenizer(word, add_special_tokens=False)["input_ids"]
        expected = sum(float((embedded[at] - embedded[mask]) @ direction) for at in ids)
        assert value == pytest.approx(expected, abs=1e-5)
    assert error < 1e-4


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_attributions_add_up_to_what_the_answer_gained(family):
    """Completeness, for real architectures: their sum is F of the text less F of the empty one."""
    model = tiny.model(family, seed=3)
    texts = ["the wonderful film was really quite moving", "a dull plot"]
    words, answers, errors = word_attributions(model, texts, max_length=64, steps=100)
    assert errors.max() < 0.05
    blank = blank_token(model.tokenizer)
    for text, values, answer in zip(texts, words, answers, strict=True):
        assert len(values) == len(text.split())
        encoded = model.tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        special = encoded.pop("special_tokens_mask").bool()
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        empty = inputs | {"input_ids": torch.where(special, inputs["input_ids"], blank)}
        with torch.no_grad():
            full, bare = (model.module(**each).logits[0].double() for each in (inputs, empty))
        gained = (full - bare)[answer] - (full - bare)[1 - answer]
        assert values.sum() == pytest.approx(float(gained), rel=0.06, abs=0.02)


def test_words_behind_the_cut_have_none():
    text = "the wonderful film was really quite moving"
    (values,), _, _ = word_attributions(tiny.model(), [text], max_length=5, steps=2)
    assert np.isfinite(values).tolist() == [True] * 3 + [False] * 4


def test_what_is_attributed_and_what_cannot_be(tmp_path, monkeypatch):
    texts = ["a b c d e", "short", "x " * 400, "f g h i j", ("a b c", "d e f")]
    assert chosen(texts, 10, 0) == [0, 3, 4]
    assert len(chosen(texts, 2, 0)) == 2
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "runtime.json").write_text("{}")
    assert torch_form(tmp_path / "export") is None
    assert "after is an export without the model folder" in why_not({"before": tmp_path, "after": None})
    assert why_not({"before": tmp_path}) == ""
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'multum[evidence]'" in why_not({"before": tmp_path})


def test_an_export_elsewhere_knows_the_folder_it_was_made_from_until_that_is_another(tmp_path):
    task, model = tiny.task(), tiny.model()
    model.save(tmp_path / "made" / "model")
    export_to(exporter("onnxruntime", "fp32"), tmp_path / "made" / "model", tmp_path / "made" / "served", "fp32", task, 0)
    assert torch_form(tmp_path / "made" / "served") == (tmp_path / "made" / "model").resolve()
    (tmp_path / "made").rename(tmp_path / "moved")
    assert torch_form(tmp_path / "moved" / "served") == (tmp_path / "moved" / "model").resolve()
    (tmp_path / "moved" / "model").rename(tmp_path / "moved" / "old")
    assert torch_form(tmp_path / "moved" / "served") is None
    tiny.model(seed=5).save(tmp_path / "moved" / "model")
    assert torch_form(tmp_path / "moved" / "served") is None


def test_an_attributor_goes_on_where_it_was(tmp_path, monkeypatch):
    model, task = tiny.model(), tiny.task()
    model.save(tmp_path / "model")
    texts = [text for text in task.inputs("test") if len(text.split()) > 4][:12]
    whole = Attributor(tmp_path / "model", task, texts, 2, 0).run(Work(tmp_path / "one", {}), "attribution-before")
    assert len(whole.words) == len(texts) == 12
    assert whole.guided.shape == (12, 6)
    assert whole.random.shape == (12, 3, 6)
    assert ((whole.whole > 0.5) & (whole.whole <= 1)).all()  # the answer given is the more probable one of two
    work, calls = Work(tmp_path / "two", {}), []
    compute = Attributor._compute
    monkeypatch.setattr(Attributor, "_compute", lambda self, *at: calls.append(at) or compute(self, *at))
    first = Attributor(tmp_path / "model", task, texts, 2, 0)
    work.arrays("attribution-before-00000", lambda: first._compute(0, 10))
    calls.clear()
    again = Attributor(tmp_path / "model", task, texts, 2, 0).run(work, "attribution-before")
    assert calls == [(10, 12)]
    assert all(np.array_equal(a, b) for a, b in zip(again.words, whole.words, strict=True))
    np.testing.assert_array_equal(again.random, whole.random)
