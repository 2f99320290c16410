"""Text classification with several labels a text, and with a number: what asks for it, scores, training, teaching, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from marked import marked, task_of
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F
from typer.testing import CliRunner

from multum import cli
from multum._measure import measure
from multum.core.task import Quality
from multum.core.teacher import logits
from multum.data import open_task
from multum.errors import InputError
from multum.steps._outputs import binary_kl
from multum.steps.distill import Distill
from multum.steps.finetune import Finetune
from multum.tasks._multi_label import MultiLabelClassification
from multum.tasks._regression import Regression, pearson
from multum.tasks.text_classification import TextClassification

STEP = Finetune(epochs=12, learning_rate=4e-3, batch_size=16, precision="fp32")
NAMES = ("bad", "good")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_lists_of_labels_ask_for_several(tmp_path: Path) -> None:
    rows = marked(60)
    plain = [{"text": row["text"], "label": row["label"]} for row in rows]
    joined = [{**row, "label": "|".join(row["label"]) or "|"} for row in plain]
    names = ClassLabel(names=["good", "bad"])
    numbered = [{**row, "label": [names.str2int(label) for label in row["label"]]} for row in plain]
    Dataset.from_list(numbered, features=Features(text=Value("string"), label=List(names))).to_parquet(tmp_path / "c.parquet")
    sources = [write(tmp_path / "a.jsonl", plain), write(tmp_path / "b.jsonl", joined), str(tmp_path / "c.parquet")]
    for source in sources:
        task = open_task("text-classification", source)
        assert isinstance(task, MultiLabelClassification)
        assert any("multi-label" in note for note in task.notes)
        assert task.labels == NAMES
        found = {
            text: {label for label, there in zip(NAMES, target, strict=True) if there}
            for name in ("train", "validation", "test")
            for text, target in zip(task.texts[name], task.targets[name], strict=True)
        }
        assert found == {row["text"]: set(row["label"]) for row in plain}


def test_one_label_stays_one_label(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": ["yes", "no"][i % 2]} for i in range(40)]
    task = open_task("text-classification", write(tmp_path / "a.jsonl", rows))
    assert isinstance(task, TextClassification)
    assert not any("multi-label" in note for note in task.notes)


def test_f1_of_pairs_of_text_and_label() -> None:
    task = task_of(MultiLabelClassification, marked(200), 40, 40)
    rng = np.random.default_rng(0)
    predictions = rng.normal(size=(120, 2)) + 2 * (task.targets["test"] - 0.5)
    quality, truth, guess = task.score(predictions, "test"), task.targets["test"] > 0.5, predictions > 0
    assert (quality.metric, quality.n) == ("f1_micro", 120)
    assert quality.value == pytest.approx(f1_score(truth, guess, average="micro"))
    assert quality.others["f1_macro"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert quality.others["exact_match"] == pytest.approx(accuracy_score(truth, guess))
    assert quality.ci95[0] < quality.value < quality.ci95[1]


def test_correlations_and_their_interval() -> None:
    task = task_of(Regression, marked(300), 40, 40)
    truth = task.targets["test"]
    guess = truth + np.random.default_rng(1).normal(size=len(truth))
    quality = task.score(guess[:, None], "test")
    assert (quality.metric, quality.n) == ("pearson", 220)
    assert quality.value == pytest.approx(pearsonr(guess, truth).statistic, abs=1e-9)
    assert quality.others["spearman"] == pytest.approx(spearmanr(guess, truth).statistic, abs=1e-9)
    assert quality.others["mse"] == pytest.approx(np.mean((guess - truth) ** 2))
    # Fisher's z gives about the same interval as the bootstrap.
    z, width = np.arctanh(quality.value), 1.96 / np.sqrt(220 - 3)
    assert quality.ci95 == pytest.approx((np.tanh(z - width), np.tanh(z + width)), abs=0.03)
    assert task.score(np.full((220, 1), 3.7), "test").value == 0.0
    assert pearson(np.array([2.0, 2e6, 2e6, 2e12, 2e12, 2e12])) == 0.0


def test_drop_is_in_points() -> None:
    task = task_of(Regression, marked(8), 4, 2)
    high, low = (Quality(metric="pearson", value=value, ci95=(0.0, 1.0), n=10) for value in (0.9, 0.88))
    assert task.drop(high, low) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", [MultiLabelClassification, Regression])
def test_the_loss_is_that_of_transformers_and_skips_what_nobody_marked(kind: Any, tmp_path: Path) -> None:
    task = task_of(kind, marked(20), 8, 6)
    tiny.model(labels=NAMES if kind is MultiLabelClassification else ("score",)).save(tmp_path / "m")
    model = task.load(str(tmp_path / "m"))
    batch = next(task.batches(model, "train", 8))
    assert batch["labels"].dtype == torch.float32
    with torch.no_grad():
        outputs = model.module(**batch)
    assert task.loss(outputs, batch).item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    blank = torch.tensor(task.encode_texts(model, task.inputs("train")[:4])["labels"])
    assert blank.isnan().all()
    known = task.loss(type(outputs)(logits=outputs.logits[:4]), {"labels": batch["labels"][:4]})
    both = task.loss(type(outputs)(logits=outputs.logits), {"labels": torch.cat([batch["labels"][:4], blank])})
    torch.testing.assert_close(known, both)


@pytest.mark.parametrize("kind", [MultiLabelClassification, Regression])
def test_training_teaching_measuring_and_answers(kind: Any, tmp_path: Path) -> None:
    task = task_of(kind, marked(400), 320, 40)
    names = NAMES if kind is MultiLabelClassification else ("score",)
    tiny.model(labels=names, layers=1).save(tmp_path / "before")
    start = task.load(str(tmp_path / "before"))
    teacher = STEP(start, task)
    teacher.save(tmp_path / "after", {"task": task.name})
    (found,) = measure([tmp_path / "after"], task, threads=1, rounds=2, texts_per_round=2)
    rows = list(task.encode(start, "test"))
    before = task.score(logits(start.module, rows, start.tokenizer.pad_token_id), "test").value
    assert found["quality"]["value"] > 0.8 > before + 0.05

    step = Distill(
        teacher=str(tmp_path / "after"),
        augment=1,
        epochs=5,
        learning_rate=4e-3,
        batch_size=16,
        cache=str(tmp_path),
        precision="fp32",
    )
    student = task.load(str(tmp_path / "before"))
    apart = [distance(kind, each, teacher, task) for each in (step(student, task), student)]
    assert apart[0] < 0.5 * apart[1]

    texts = ["this wonderful film with its moving plot", "this dreadful film with its tedious plot"]
    call = ["predict", str(tmp_path / "after"), *texts]
    told = json.loads(CliRunner().invoke(cli.app, [*call, "--json"]).stdout)
    lines = CliRunner().invoke(cli.app, call).stdout.splitlines()
    assert [line.rsplit("\t", 1)[1] for line in lines] == texts
    if kind is Regression:
        assert told[0]["score"] > 0.5 > -0.5 > told[1]["score"]
        assert lines[0].split("\t")[0] == f"{told[0]['score']:.3f}"
    else:
        assert [one["labels"] for one in told] == [["good"], ["bad"]]
        assert all(0 <= share <= 1 for share in told[0]["probabilities"].values())
        assert set(told[0]["labels"]) == {name for name, share in told[0]["probabilities"].items() if share > 0.5}
        assert lines[0].startswith(f"good {told[0]['probabilities']['good']:.3f}")


def distance(kind: Any, student: Any, teacher: Any, task: Any) -> float:
    rows = list(task.encode(student, "validation"))
    ours, theirs = (torch.from_numpy(logits(m.module, rows, m.tokenizer.pad_token_id)) for m in (student, teacher))
    return (F.mse_loss(ours, theirs) if kind is Regression else binary_kl(ours, theirs, 1.0).mean()).item()


def test_a_score_is_asked_for_by_its_column(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": row["score"] + i / 100} for i, row in enumerate(marked(40))]
    rows[3]["label"] = None
    source = write(tmp_path / "a.jsonl", rows)
    task = open_task("text-classification", source, columns={"score": "label"})
    assert isinstance(task, Regression)
    assert "1 row dropped: no score" in task.notes
    with pytest.raises(InputError, match=r"--columns score=COLUMN"):
        open_task("text-classification", source)
    with pytest.raises(InputError, match="names a label and a score"):
        open_task("text-classification", source, columns={"score": "label", "label": "label"})


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        (
            [{"text": f"t{i}", "score": "high"} for i in range(9)],
            {"score": "score"},
            "9 scores are no numbers: 'high', 'high', 'high', ...",
        ),
        ([{"text": f"t{i}", "score": 2.0} for i in range(9)], {"score": "score"}, "all scores of the train split are 2"),
        ([{"text": f"t{i}", "label": []} for i in range(9)], {}, "no training text has a label"),
        ([{"text": f"t{i}", "score": 2.0} for i in range(9)], {"score": "stars"}, "no column 'stars'"),
    ],
)
def test_marks_that_cannot_be_used(tmp_path: Path, rows: list[Any], columns: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_task("text-classification", write(tmp_path / "a.jsonl", rows), columns=columns)


def test_a_head_with_other_outputs_is_refused(tmp_path: Path) -> None:
    tiny.model().save(tmp_path / "two")
    with pytest.raises(InputError, match="has 2 outputs"):
        task_of(Regression, marked(8), 4, 2).load(str(tmp_path / "two"))
    with pytest.raises(InputError, match="the model's labels are negative, positive, the data's are bad, good"):
        task_of(MultiLabelClassification, marked(20), 14, 3).load(str(tmp_path / "two"))


def test_shrink_says_what_it_takes(tmp_path: Path) -> None:
    tiny.language_model("bert").save(tmp_path / "m")
    data = write(tmp_path / "a.jsonl", [{"text": row["text"]} for row in marked(40)])
    common = ["--task", "fill-mask", "--data", data, "-o", str(tmp_path / "out")]
    run = CliRunner().invoke(cli.app, ["shrink", str(tmp_path / "m"), *common])
    assert run.exit_code != 0
    said = " ".join((run.stderr or str(run.exception)).split())
    taken = "question-answering, summarization, text-classification, text-generation, token-classification, translation"
    assert f"shrink takes models for {taken}, not for fill-mask" in said
    assert not (tmp_path / "out").exists()
