"""Private training: gradients of single examples, the noise, the ε, and what would make it wrong."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import taggers
import tiny
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from multum._compare import _private
from multum._compare_more import promised
from multum.core import private
from multum.core.model import Model
from multum.core.per_example import PerExample, batch_of
from multum.core.private import Budget, epsilon_of, private_step
from multum.core.step import make
from multum.core.training import fit
from multum.errors import InputError, MissingExtra
from multum.evidence.privacy import attack, log_likelihood
from multum.steps.distill import Distill
from multum.steps.drop_layers import DropLayers
from multum.steps.finetune import Finetune
from multum.steps.prune_weights import PruneWeights

DP = {"dp_epsilon": 1.0, "batch_size": 16, "epochs": 1, "learning_rate": 1e-3}


@cache
def task() -> Any:
    return tiny.task(n_train=64, n_validation=16)


def loss_of(one: Any) -> Any:
    return lambda module, batch: one.loss(module(**{k: v for k, v in batch.items() if k != "labels"}), batch)


def per_example(found: Model, loss: Any) -> PerExample:
    return PerExample(found.module, loss, lambda rows: batch_of(rows, found.tokenizer.pad_token_id, found.module))


def slow(found: Model, loss: Any, rows: list[Any]) -> list[dict[str, torch.Tensor]]:
    """Every row's gradients, one row after the other, by autograd."""
    gradients = []
    for row in rows:
        found.module.zero_grad()
        loss(found.module, batch_of([row], found.tokenizer.pad_token_id, found.module)).backward()
        gradients.append({name: p.grad.clone() for name, p in found.module.named_parameters() if p.grad is not None})
    found.module.zero_grad()
    return gradients


def undropped(found: Model) -> Model:
    for part in found.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    found.module.config._attn_implementation = "eager"
    return found


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "llama", "gpt2"])
def test_gradients_are_those_of_each_example_alone(family: str) -> None:
    found = undropped(tiny.model(family, layers=1))
    for part in found.module.modules():  # attention's own, a number beside the modules
        for name in ("attention_dropout", "attn_pdrop", "dropout_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    rows, loss = list(task().encode(found, "train"))[:5], loss_of(task())
    expected = slow(found, loss, rows)
    with per_example(found, loss) as examples:
        examples.prove(rows[:3])
        examples.backward(rows)
        names = {id(p): name for name, p in found.module.named_parameters()}
        assert {names[id(p)] for p in examples.trained} == set(expected[0])
        for p in examples.trained:
            wanted = torch.stack([one[names[id(p)]] for one in expected])
            torch.testing.assert_close(p.grad_sample, wanted, atol=2e-5, rtol=1e-3)


def test_a_mean_over_tokens_is_each_examples_own_mean() -> None:
    """The task's loss of a batch divides by all its tokens, so that a long example would change what a short one does."""
    one = taggers.tagging(train=8)
    found = undropped(taggers.tagger())
    rows, loss = list(one.encode(found, "train"))[:4], loss_of(one)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    expected = slow(found, loss, rows)
    with torch.no_grad():
        together, *apart = (
            float(loss(found.module, batch_of(some, found.tokenizer.pad_token_id, found.module)))
            for some in (rows, *([row] for row in rows))
        )
    assert abs(together - sum(apart) / 4) > 1e-4
    with per_example(found, loss) as examples:
        examples.prove(rows[:3])
        examples.backward(rows)
        for name, p in found.module.named_parameters():
            if name in expected[0]:
                torch.testing.assert_close(p.grad_sample, torch.stack([e[name] for e in expected]), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("at_once", [2, 8])
def test_a_step_is_the_mean_of_clipped_gradients(at_once: int) -> None:
    """Without noise, against a loop; parts of a batch add up to the batch."""
    found, clip, expected_size = undropped(tiny.model(layers=1)), 0.5, 4.0
    rows, loss = list(task().encode(found, "train"))[:5], loss_of(task())
    each = slow(found, loss, rows)
    norms = [torch.cat([g.flatten() for g in one.values()]).norm() for one in each]
    assert min(norms) < clip < max(norms) or min(norms) > clip
    wanted = {
        name: sum(one[name] * min(1.0, clip / float(size)) for one, size in zip(each, norms, strict=True)) / expected_size
        for name in each[0]
    }
    seen: dict[str, torch.Tensor] = {}
    with per_example(found, loss) as examples:
        examples.prove(rows[:3])
        optimizer = private._optimizer(
            examples.trained, sigma=0.0, clip=clip, expected=expected_size, learning_rate=1e-3, weight_decay=0.0
        )
        optimizer.attach_step_hook(lambda _: seen.update({n: p.grad.clone() for n, p in found.module.named_parameters()}))
        private_step(optimizer, examples, rows, at_once)
    for name, gradient in wanted.items():
        torch.testing.assert_close(seen[name], gradient, atol=1e-5, rtol=1e-3)


def test_a_step_on_nobody_is_noise_of_the_size_that_is_accounted_for() -> None:
    found, seen = tiny.model(layers=1), []
    rows, loss = list(task().encode(found, "train"))[:3], loss_of(task())
    with per_example(found, loss) as examples:
        examples.prove(rows)
        optimizer = private._optimizer(examples.trained, sigma=2.0, clip=0.3, expected=8.0, learning_rate=1e-3, weight_decay=0.0)
        optimizer.attach_step_hook(lambda _: seen.append(torch.cat([p.grad.flatten() for p in examples.trained])))
        for _ in range(2):
            private_step(optimizer, examples, [], 4)
    noise = torch.stack(seen)
    assert float(noise.std()) == pytest.approx(2.0 * 0.3 / 8, rel=0.03)  # thousands of draws
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.05


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(1.0, 1, 1e-5), (4.0, 9, 1e-4), (20.0, 4, 1e-6)])
def test_epsilon_of_all_examples_at_once_is_that_of_the_gaussian_mechanism(sigma: float, steps: int, delta: float) -> None:
    """δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) with μ = √T/σ (Balle & Wang 2018, theorem 8)."""
    mu = np.sqrt(steps) / sigma
    exact = brentq(lambda e: norm.cdf(mu / 2 - e / mu) - np.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 1e-9, 100)
    found = epsilon_of(sigma, 1.0, steps, delta)
    assert exact - 1e-6 <= found <= exact + 0.03


@pytest.mark.parametrize(("sigma", "q", "delta"), [(0.8, 0.1, 1e-4), (1.5, 0.25, 1e-3)])
def test_epsilon_of_one_sampled_step_is_that_of_its_integral(sigma: float, q: float, delta: float) -> None:
    """δ(ε) = ∫ max(0, p − e^ε p') between N(0, σ²) and its mixture with N(1, σ²), both ways round."""

    def without(x: float) -> float:
        return float(norm.pdf(x, 0, sigma))

    def with_one(x: float) -> float:
        return (1 - q) * without(x) + q * float(norm.pdf(x, 1, sigma))

    def told(e: float) -> float:
        ways = ((with_one, without), (without, with_one))
        return max(
            quad(lambda x, a=a, b=b: max(0.0, a(x) - np.exp(e) * b(x)), -12 * sigma, 1 + 12 * sigma, limit=400, points=[0, 1])[0]
            for a, b in ways
        )

    exact = brentq(lambda e: told(e) - delta, 1e-6, 20)
    assert exact - 1e-3 <= epsilon_of(sigma, q, 1, delta) <= exact + 0.03


@cache
def trained() -> Model:
    return Finetune(**DP)(tiny.model(), task())


def taught(folder: Any) -> Model:
    """By a teacher that has not looked at the examples."""
    tiny.model(seed=4).save(folder / "teacher")
    step = Distill(student={"layers": 1}, teacher=str(folder / "teacher"), cache=str(folder / "cache"), **DP)
    return step(tiny.model(), task())


@pytest.mark.parametrize("by", ["finetune", "distill"])
def test_what_was_spent_is_stated_and_is_what_opacus_accounts_for(by: str, tmp_path: Any) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    found = trained() if by == "finetune" else taught(tmp_path)
    assert found.history[-1]["step"] == by
    training = found.history[-1]["training"]
    assert training.keys() == {"seconds", "privacy"}, "a mean loss of private texts is no private figure"
    spent = training["privacy"]
    assert (spent["steps"], spent["sample_rate"], spent["delta"]) == (4, 0.25, 0.1 / 64)
    theirs, looser = PRVAccountant(), RDPAccountant()
    for _ in range(spent["steps"]):
        theirs.step(noise_multiplier=spent["noise_multiplier"], sample_rate=spent["sample_rate"])
        looser.step(noise_multiplier=spent["noise_multiplier"], sample_rate=spent["sample_rate"])
    assert spent["epsilon"] == pytest.approx(theirs.get_epsilon(spent["delta"]), abs=1e-3)
    assert 0.98 <= spent["epsilon"] <= 1
    assert spent["epsilon"] <= looser.get_epsilon(spent["delta"])


def test_a_comparison_states_what_was_spent_unless_a_later_step_looked_again(tmp_path: Any) -> None:
    trained().save(tmp_path / "private")
    found = _private(tmp_path / "private")
    assert found is not None
    assert found["delta"] == 0.1 / 64
    assert promised({"after": {"private": found}}).endswith(
        f"differential privacy by its record: ε = {found['epsilon']:.3g}, δ = 0.002."
    )
    again = trained().copy()
    again.history.append({"step": "finetune", "fields": {}, "data": "train", "training": {"loss": 1.0}})
    again.save(tmp_path / "again")
    assert _private(tmp_path / "again") is None
    assert promised({"after": {"private": None}}) == ""


def test_nothing_is_left_on_the_model_and_noise_does_not_come_from_the_seed() -> None:
    first, second = trained(), Finetune(**DP)(tiny.model(), task())
    assert not torch.equal(first.linears()["classifier"].weight, second.linears()["classifier"].weight)
    plain = tiny.model().module
    for name, part in first.module.named_modules():
        assert vars(part).keys() == vars(plain.get_submodule(name)).keys()
        assert not part._forward_hooks
        assert not part._backward_hooks
    for parameter in first.module.parameters():
        assert not vars(parameter)
        assert parameter.requires_grad
        assert parameter.grad is None
    copy.deepcopy(first.module)


def test_earlier_private_trainings_on_the_same_examples_add_up(tmp_path: Any) -> None:
    trained().save(tmp_path / "teacher")
    step = Distill(student={"layers": 1}, teacher=str(tmp_path / "teacher"), cache=str(tmp_path / "cache"), **DP)
    spent = step(trained(), task()).history[-1]["training"]["privacy"]
    own, earlier = spent["epsilon"], trained().history[-1]["training"]["privacy"]["epsilon"]
    assert spent["epsilon_in_all"] == pytest.approx(own + earlier)
    assert spent["delta_in_all"] == pytest.approx(2 * 0.1 / 64)
    other = replace(task(), fingerprints={"train": "others"})
    again = Finetune(**DP)(trained(), other).history[-1]["training"]["privacy"]
    assert "epsilon_in_all" not in again


def test_a_model_or_teacher_that_has_seen_the_examples_without_noise_is_refused(tmp_path: Any) -> None:
    seen = Finetune(epochs=1)(tiny.model(), task())
    with pytest.raises(InputError, match="the model has looked at these examples without noise \\(finetune\\)"):
        Finetune(**DP)(seen, task())
    seen.save(tmp_path)
    with pytest.raises(InputError, match="the teacher has looked at these examples without noise"):
        Distill(teacher=str(tmp_path), cache=str(tmp_path / "cache"), **DP)(tiny.model(), task())


def test_what_looks_at_weights_alone_has_seen_no_examples() -> None:
    cut = PruneWeights(sparsity=0.1)(DropLayers(keep=1)(tiny.model(), task()), task())
    assert "privacy" in Finetune(**DP)(cut, task()).history[-1]["training"]
    looked = DropLayers(keep=1, which="importance", samples=8)(tiny.model(), task())
    with pytest.raises(InputError, match="without noise \\(drop_layers\\)"):
        Finetune(**DP)(looked, task())
    looked.history[-1] |= {"step": "gone", "data": None}
    with pytest.raises(InputError, match="without noise \\(gone\\)"):
        Finetune(**DP)(looked, task())


def test_examples_that_are_several_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = task().encode(tiny.model(), "train")
    monkeypatch.setattr(type(task()), "encode", lambda self, model, split: [*whole, whole[0]])
    with pytest.raises(InputError, match="the 64 training examples are read in 65"):
        Finetune(**DP)(tiny.model(), task())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dp_epsilon": 0}, "dp_epsilon must be above 0"),
        ({"dp_epsilon": None, "dp_delta": 1e-5}, "dp_delta goes with dp_epsilon"),
        ({"dp_delta": 2.0}, "dp_delta is a probability"),
        ({"dp_clip": 0.0}, "dp_clip must be above 0"),
        ({"precision": "bf16"}, "computes in fp32"),
        ({"checkpointing": True}, "accumulate"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], said: str) -> None:
    for name, more in (("finetune", {}), ("distill", {"teacher": "x"})):
        with pytest.raises(InputError, match=said):
            make(name, {**DP, **more, **fields})


def test_variants_are_refused() -> None:
    with pytest.raises(InputError, match="augment: variants of one text would count"):
        make("distill", {**DP, "teacher": "x", "augment": 2})


def test_a_delta_that_allows_to_publish_an_example_and_a_budget_that_no_noise_keeps_are_refused() -> None:
    with pytest.raises(InputError, match=r"must be below 0\.02"):
        Finetune(**{**DP, "dp_delta": 0.02})(tiny.model(), task())
    with pytest.raises(InputError, match="no noise keeps ε within"):
        Finetune(**{**DP, "dp_epsilon": 1e-7})(tiny.model(), task())


def test_layers_that_opacus_cannot_handle_are_named_and_adapters_go_around_them() -> None:
    """MPNet looks positions up in a table of (tokens, tokens), which has no batch; Opacus would take tokens for examples."""
    found = tiny.model("mpnet")
    with pytest.raises(InputError, match=r"mpnet.encoder.relative_attention_bias \(Embedding\); train with lora"):
        Finetune(**DP)(found, task())
    with pytest.raises(InputError, match=r"embed_tokens \(GemmaTextScaledWordEmbedding\): it has buffers"):
        Finetune(**DP)(tiny.model("gemma"), task())
    pytest.importorskip("peft")
    after = Finetune(**DP, lora={"rank": 2})(found, task())
    assert after.history[-1]["training"]["privacy"]["epsilon"] <= 1


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    private._least_noise.cache_clear()
    with pytest.raises(MissingExtra, match="multum\\[dp\\]"):
        Finetune(**DP)(tiny.model(), task())


def test_it_keeps_a_model_from_learning_texts_by_heart() -> None:
    """Labels by chance can only be learnt by heart: without noise members are told from others, with it they are not."""
    data = tiny.splits(n_train=64, n_validation=64)
    rng = np.random.default_rng(0)
    shuffled = [list(rng.permutation(split["label"])) for split in (data.train, data.validation)]
    start = tiny.model(layers=1)
    auc = {}
    for budget in (None, Budget(epsilon=1.0, delta=1e-5)):
        found = start.copy()
        one = tiny.task(n_train=64, n_validation=64)
        rows = []
        for split, labels in zip(("train", "validation"), shuffled, strict=True):
            numbers = [one.labels.index(label) for label in labels]
            rows.append([{**row, "labels": number} for row, number in zip(one.encode(found, split), numbers, strict=True)])
        fit(found, rows[0], loss_of(one), epochs=60, learning_rate=3e-3, batch_size=64, precision="fp32", private=budget)
        scores = []
        for some in rows:
            with torch.no_grad():
                batch = batch_of(some, found.tokenizer.pad_token_id, found.module)
                logits = found.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()
            scores.append(log_likelihood(logits, batch["labels"].numpy()))
        auc[budget is not None] = attack(*scores)["auc"]["value"]
    assert auc[False] > 0.8
    assert auc[True] < 0.72  # that of a model that knows nothing is above in one of 50,000 cases
