"""What causal models write behind prompts: against a slow loop, in batches, shown while it is written, from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from multum._continue import continued
from multum._pace import figures, paces
from multum.cli import app
from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.surgery import head_size, keep_heads
from multum.core.writing import Decoding, TorchWriter, chosen, prompt_of, write
from multum.errors import InputError
from multum.runtimes._chat import ChatTokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["the film was", "a really wonderful story with", "boring", "its music and cast in the scene is quite"]


@torch.no_grad()
def slowly(model: Model, prompt: str, most: int) -> tuple[list[int], float]:
    """The most probable token after every prefix, each by a pass over all of it, up to the end token; and Σ log p."""
    ids = model.tokenizer(prompt)["input_ids"]
    new: list[int] = []
    total = 0.0
    while len(new) < most and (not new or new[-1] != model.tokenizer.eos_token_id):
        logs = model.module(torch.tensor([ids + new]), use_cache=False).logits[0, -1].double().log_softmax(0)
        new.append(int(logs.argmax()))
        total += float(logs.max())
    return new, total


def ending(model: Model) -> Model:
    """The same model, whose third greedy token behind the first prompt ends the text."""
    token = slowly(model, PROMPTS[0], 3)[0][-1]
    model.module.generation_config.eos_token_id = token
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(token)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_text_is_that_of_a_loop_over_whole_passes(family: str) -> None:
    model = ending(tiny.language_model(family))
    writer = TorchWriter(model.module, model.tokenizer)
    found = list(write(writer, PROMPTS, Decoding(max_new_tokens=12)))
    lengths = []
    for prompt, made in zip(PROMPTS, found, strict=True):
        new, total = slowly(model, prompt, 12)
        whole = model.tokenizer(prompt)["input_ids"] + new
        assert prompt + made.text == model.tokenizer.decode(whole, skip_special_tokens=True)
        assert made.tokens == len(new)
        assert made.score == pytest.approx(total / len(new), abs=1e-5)
        lengths.append(len(new))
    assert lengths[0] <= 3 < max(lengths)  # one ends, another does not


def test_a_model_without_attention_in_front_is_run_without_a_cache() -> None:
    model = tiny.language_model("llama")
    keep_heads(blocks_of(model.module)[0], family_of(model.module), [], head_size(model.module))
    made = next(write(TorchWriter(model.module, model.tokenizer), PROMPTS[:1], Decoding(max_new_tokens=8)))
    new, total = slowly(model, PROMPTS[0], 8)
    assert made.tokens == len(new)
    assert made.score == pytest.approx(total / len(new), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_shown_is_what_was_written_piece_by_piece(family: str) -> None:
    model, pieces = tiny.language_model(family), []
    made = next(write(TorchWriter(model.module, model.tokenizer), PROMPTS[:1], Decoding(max_new_tokens=20), pieces.append))
    assert "".join(pieces) == made.text
    assert len(pieces) > 3


def test_no_setting_of_the_model_is_used_but_its_end() -> None:
    model = tiny.language_model("llama")
    plain = list(write(TorchWriter(model.module, model.tokenizer), PROMPTS, Decoding(max_new_tokens=10)))
    config = model.module.generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.no_repeat_ngram_size = True, 3.0, 5.0, 1
    assert list(write(TorchWriter(model.module, model.tokenizer), PROMPTS, Decoding(max_new_tokens=10))) == plain


def test_drawing_depends_on_the_seed_and_leaves_torch_s_own_draws_alone() -> None:
    model = tiny.language_model("llama")
    writer = TorchWriter(model.module, model.tokenizer)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (
        next(write(writer, PROMPTS[:1], Decoding(max_new_tokens=16, temperature=1.5, seed=seed))).text for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    rng = np.random.default_rng(0)

    def shares(decoding: Decoding) -> np.ndarray:
        return np.bincount([chosen(logits, decoding, rng)[0] for _ in range(4000)], minlength=4) / 4000

    np.testing.assert_allclose(shares(Decoding(temperature=1.0)), np.exp(logits), atol=0.03)
    squares = np.exp(2 * logits) / np.exp(2 * logits).sum()
    np.testing.assert_allclose(shares(Decoding(temperature=0.5)), squares, atol=0.03)
    np.testing.assert_allclose(shares(Decoding(temperature=1.0, top_p=0.75)), [0.625, 0.375, 0, 0], atol=0.03)
    # The score is the model's own, whatever the temperature.
    token, log = chosen(logits + 7, Decoding(), rng)
    assert (token, log) == (0, pytest.approx(np.log(0.5)))


def test_wrong_settings_and_prompts_are_told_at_once() -> None:
    with pytest.raises(InputError, match=r"4 problems|3 problems") as caught:
        Decoding(max_new_tokens=0, temperature=-1.0, top_p=0.0)
    assert len(caught.value.problems) == 3
    with pytest.raises(InputError, match="top_p is for drawing"):
        Decoding(top_p=0.5)
    model = tiny.language_model("gpt2")
    writer = TorchWriter(model.module, model.tokenizer)
    with pytest.raises(InputError) as caught:
        list(write(writer, ["", "fine", "a film " * 64], Decoding()))
    assert [problem[:8] for problem in caught.value.problems] == ["prompt 1", "prompt 3"]
    assert "64 at most" in caught.value.problems[1]
    with pytest.raises(InputError, match="no chat template"):
        prompt_of(model.tokenizer, ({"role": "user", "content": "a"},))


def test_chats_are_written_as_transformers_writes_them() -> None:
    model = tiny.language_model("llama")
    template = TEMPLATE + "{{ messages | tojson }}{{ bos_token }}"
    model.tokenizer.chat_template = template
    ours = ChatTokenizer(model.tokenizer.backend_tokenizer, 1, template, {"bos_token": "<s>"})
    chat = [{"role": "user", "content": 'a "good" film?'}, {"role": "assistant", "content": "<no> & é"}]
    for prompt in (True, False):
        expected = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == expected
    assert prompt_of(ours, chat) == prompt_of(model.tokenizer, chat)
    assert prompt_of(ours, "a film") == prompt_of(model.tokenizer, "a film") == model.tokenizer("a film")["input_ids"]
    broken = ChatTokenizer(model.tokenizer.backend_tokenizer, 1, "{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InputError, match="roles must alternate"):
        broken.apply_chat_template(chat)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.language_model("llama")
    model.tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("writing") / "m"
    model.save(folder)
    return folder


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_predict_continues_texts(saved: Path, tmp_path: Path) -> None:
    options = ["--max-new-tokens", "6", "--threads", "1"]
    done = call(saved, *PROMPTS, *options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = list(continued(saved, PROMPTS, Decoding(max_new_tokens=6), threads=1))
    assert found == expected
    assert set(found[0]) == {"text", "answer", "score", "tokens", "generation"}
    assert found[0]["generation"] == {"max_new_tokens": 6, "temperature": 0.0}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    lines = call(saved, "--input", tmp_path / "prompts.txt", *options).stdout.splitlines()
    assert [line.split("\t")[::2] for line in lines] == [[" ".join(one["answer"].split()), one["text"]] for one in found]
    alone = call(saved, PROMPTS[0], *options)
    assert alone.stdout == found[0]["answer"] + "\n"
    assert "6 tokens, log p of a token" in alone.stderr


def test_predict_answers_chats_and_says_what_it_cannot(saved: Path, tmp_path: Path) -> None:
    asked = json.loads(call(saved, "a film?", "--chat", "--max-new-tokens", "4", "--json").stdout)[0]
    assert asked["text"] == "a film?"
    assert asked["generation"]["chat"] is True
    assert asked["answer"] != json.loads(call(saved, "a film?", "--max-new-tokens", "4", "--json").stdout)[0]["answer"]
    (tmp_path / "pairs.csv").write_text("text,other\na,b\n")
    wrong = call(saved, "a", "--pair", "b")
    assert wrong.exit_code != 0
    tiny.model("bert").save(tmp_path / "classifier")
    refused = call(tmp_path / "classifier", "a", "--chat", "--temperature", "1")
    assert isinstance(refused.exception, InputError) or refused.exit_code == 2
    assert "for causal language models" in (refused.stderr + str(refused.exception))


def test_pace_is_told_by_tokens_and_rounds() -> None:
    model = tiny.language_model("llama")

    class Predictor:
        module, tokenizer = model.module, model.tokenizer

    (one,) = paces(Predictor(), ["the film was a wonderful story " * 20])
    assert (one["prompt"], one["new"]) == (32, 32)
    assert one["first_s"] > 0
    assert one["rest_s"] > 0

    def told(first: list[Any], this: list[Any]) -> dict[str, float]:
        return {"value": float(np.median(np.array(first) / np.array(this)))}

    slow = [[{"prompt": 100, "new": 11, "first_s": 0.2, "rest_s": 1.0}]] * 3
    fast = [[{"prompt": 100, "new": 11, "first_s": 0.1, "rest_s": 0.25}]] * 3
    result = figures(fast, slow, told)
    assert result["first_token_p50_ms"] == 100
    assert result["prefill_tokens_per_s"] == 1000
    assert result["decode_tokens_per_s"] == 40
    assert result["prefill_ratio_to_first"]["value"] == pytest.approx(2)
    assert result["decode_ratio_to_first"]["value"] == pytest.approx(4)
    assert figures([], [], told) == {}
