"""What a teacher says of every token, in `distill_generation`: limits, reductions and explicit loops, for both kinds of writers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import translators
from lessons import other_words, uld_by_loops

from multum.core.continuations import continued, pieces, rows_of
from multum.core.generated import cached_texts
from multum.core.model import Model
from multum.core.training import fit
from multum.errors import InputError
from multum.steps.distill_generation import DistillGeneration
from multum.steps.drop_layers import DropLayers
from multum.tasks.text_generation import TextGeneration

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3, "precision": "fp32"}
SHORT: dict[str, Any] = {"beams": 1, "max_new_tokens": 6, "prompt_tokens": 5, "prompts": 16, **TRAINING}
TEACHER_ALONE: dict[str, Any] = {"alpha": 1.0, "mix": 1.0}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    folder = tmp_path_factory.mktemp("causal") / "teacher"
    tiny.language_model("llama", seed=1).save(folder)
    return TextGeneration.from_splits(tiny.text_splits(8, 2, 2)), str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    folder = tmp_path_factory.mktemp("pairs") / "teacher"
    translators.translator(seed=2, spread=2.0).save(folder)
    return translators.translating(16, 2, 2), str(folder)


def student(kind: str) -> Model:
    return tiny.language_model("llama", layers=1) if kind == "causal" else translators.translator(layers=1)


def taught(kind: str, given: tuple[Any, str], folder: Path, **fields: Any) -> Model:
    task, teacher = given
    fields = {**(SHORT if kind == "causal" else {"beams": 1, **TRAINING}), **TEACHER_ALONE, **fields}
    return DistillGeneration(teacher=teacher, cache=str(folder), **fields)(student(kind), task)


def difference(one: Model, other: Model) -> float:
    weights = other.module.state_dict()
    return max((value - weights[name]).abs().max().item() for name, value in one.module.state_dict().items())


def test_at_sequence_level_it_is_training_on_what_the_teacher_writes(causal: tuple[Any, str], tmp_path: Path) -> None:
    task, folder = causal
    found = taught("causal", causal, tmp_path, alpha=0.0, mix=0.0, prompts=None)
    teacher, ours = task.load(folder), student("causal")
    prompts = [piece.prompt for piece in pieces(list(task.inputs("train")), teacher.tokenizer, 5, 6)]
    texts = continued(teacher.module, teacher.tokenizer, prompts, 6, do_sample=False)
    rows = rows_of(ours.module, ours.tokenizer, prompts, texts)

    def loss(module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    fit(ours, rows, loss, **TRAINING)
    assert difference(found, ours) < 1e-5 < 1e-3 < difference(found, student("causal"))
    assert found.history[-1]["texts"] == {"sources": len(prompts), "references": 0, "empty": 0}
    drawn = [taught("causal", causal, tmp_path, alpha=0.0, mix=0.0, sample=True) for _ in range(2)]
    assert difference(*drawn) == 0.0


def test_the_model_may_teach_a_student_of_its_own(causal: tuple[Any, str], tmp_path: Path) -> None:
    task, folder = causal
    fields, model = {**SHORT, "cache": str(tmp_path), "prompts": 8}, task.load(folder)
    made = DistillGeneration(student={"layers": 1}, **fields)(model, task)
    assert made.history[-1]["kept_blocks"] == [0]
    assert made.history[-1]["teacher_fingerprint"] == model.fingerprint()
    apart = DistillGeneration(teacher=folder, **fields)(DropLayers(which=(1,))(model, task), task)
    assert difference(made, apart) == 0.0
    with pytest.raises(InputError, match="takes a teacher"):
        DistillGeneration()


def test_an_encoder_decoders_texts_may_be_drawn_too(pairs: tuple[Any, str], tmp_path: Path) -> None:
    task, folder = pairs
    teacher = task.load(folder)
    sources = list(task.inputs("train"))
    drawn = [cached_texts(teacher, sources, tmp_path, precision="fp32", drawn=seed) for seed in (0, 1, 0)]
    searched = cached_texts(teacher, sources, tmp_path, precision="fp32")
    assert drawn[0] == drawn[2]
    assert len({tuple(texts) for texts in (*drawn, searched)}) == 3
    made = taught("pairs", pairs, tmp_path, alpha=0.0, mix=0.0, sample=True)
    assert made.history[-1]["generation"]["drawn"] == 0


@pytest.mark.parametrize("kind", ["causal", "pairs"])
def test_the_limits_of_gkd(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """beta 0 is forward, 1 reverse KL; lambda 0 is offline."""
    given = request.getfixturevalue(kind)
    named = [taught(kind, given, tmp_path, live=True, divergence=name) for name in ("forward_kl", "reverse_kl")]
    limits = [taught(kind, given, tmp_path, live=True, divergence={"jsd": beta}, on_policy=0.0) for beta in (0, 1)]
    between = taught(kind, given, tmp_path, divergence={"jsd": 0.5})
    assert [one.fingerprint() for one in named] == [one.fingerprint() for one in limits]
    assert len({one.fingerprint() for one in (*named, between)}) == 3


@pytest.mark.parametrize("kind", ["causal", "pairs"])
def test_what_the_student_writes_itself_needs_no_reference(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    given = request.getfixturevalue(kind)
    options = {"divergence": {"skew_kl": 0.1}, "on_policy": 1.0}
    whole, again = (taught(kind, given, tmp_path, alpha=1.0, **options) for _ in range(2))
    assert whole.fingerprint() == again.fingerprint()
    # Labels count for nothing, so that half the weight on the teacher is half the loss, and Adam does not see the size of a loss.
    half = taught(kind, given, tmp_path, alpha=0.5, **options)
    assert half.history[-1]["training"]["loss"] == pytest.approx(whole.history[-1]["training"]["loss"] / 2, rel=0.02)
    assert difference(whole, taught(kind, given, tmp_path, divergence={"skew_kl": 0.1})) > 1e-4


def test_all_that_is_kept_of_the_teacher_is_the_teacher(pairs: tuple[Any, str], tmp_path: Path) -> None:
    live = taught("pairs", pairs, tmp_path, live=True)
    words = len(student("pairs").tokenizer)
    assert difference(live, taught("pairs", pairs, tmp_path, sparse_logits={"top_k": words})) < 1e-3
    assert difference(live, taught("pairs", pairs, tmp_path)) > 1e-3


def test_across_tokenizers_sorted_probabilities_are_compared(causal: tuple[Any, str], tmp_path: Path) -> None:
    task, folder = causal
    ours = tiny.language_model("gpt2", layers=1)
    ours.tokenizer = other_words()
    ours.module.resize_token_embeddings(len(ours.tokenizer))
    fields = {**SHORT, "alpha": 1.0, "mix": 1.0, "divergence": "uld", "batch_size": 100, "learning_rate": 1e-12}
    step = DistillGeneration(teacher=folder, cache=str(tmp_path), **{**fields, "prompts": 7, "dropout": False})
    loss = step(ours, task).history[-1]["training"]["loss"]
    teacher = task.load(folder)
    found = pieces(list(task.inputs("train")), teacher.tokenizer, 5, 6)
    chosen = [found[i] for i in sorted(random.Random(0).sample(range(len(found)), 7))]
    given = [piece.prompt for piece in chosen], [piece.reference for piece in chosen]
    rows, said = [], []
    for model in (ours, teacher):
        rows.append(rows_of(model.module, model.tokenizer, *given))
        with torch.no_grad():
            said.append([model.module(torch.tensor([row["input_ids"]])).logits[0].softmax(-1) for row in rows[-1]])
    assert [len(row["input_ids"]) for row in rows[0]] != [len(row["input_ids"]) for row in rows[1]]
    assert loss == pytest.approx(uld_by_loops(*said, *rows), abs=1e-4)
    changed = {"learning_rate": 2e-3, "batch_size": 4, "epochs": 4}
    nearer = DistillGeneration(teacher=folder, cache=str(tmp_path), **{**fields, **changed})(ours, task)
    assert nearer.history[-1]["training"]["loss"] < loss
    written = DistillGeneration(teacher=folder, cache=str(tmp_path), on_policy=1.0, **{**fields, **changed, "epochs": 1})(
        ours, task
    )
    assert written.fingerprint() != nearer.fingerprint() != ours.fingerprint()
    with pytest.raises(InputError, match="or divergence: uld"):
        DistillGeneration(teacher=folder, cache=str(tmp_path), **{**fields, "divergence": "reverse_kl"})(ours, task)


def test_what_does_not_go_together_is_said(causal: tuple[Any, str], tmp_path: Path) -> None:
    task, folder = causal
    with pytest.raises(InputError, match=r"prompt_tokens is 63, but the teacher reads 63 tokens at most"):
        DistillGeneration(teacher=folder, cache=str(tmp_path), **{**SHORT, "prompt_tokens": 63})(student("causal"), task)
    with pytest.raises(InputError) as caught:
        DistillGeneration(teacher="t", on_policy=0.5, divergence="kl", sparse_logits={"top": 2})
    assert len(caught.value.problems) == 3
    for fields in ({"live": True}, {"on_policy": 0.5}, {"divergence": {"jsd": 0.5}}):
        with pytest.raises(InputError, match="sparse_logits says what is kept for forward KL"):
            DistillGeneration(teacher="t", alpha=1.0, sparse_logits={"sample": 5}, **fields)
    empty = TextGeneration(texts={"train": ["a", ""], "validation": [], "test": []})
    with pytest.raises(InputError, match="no training text has a prompt"):
        DistillGeneration(teacher=folder, cache=str(tmp_path), **SHORT)(student("causal"), empty)
