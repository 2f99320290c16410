"""Texts cut into prompts and what follows, put together again, and continued: against a loop over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from multum.core.continuations import AS_IT_IS, Continuation, continued, pieces, rows_of, seeded
from multum.core.families import blocks_of, family_of
from multum.core.generated import cached_continuations
from multum.core.model import Model
from multum.core.surgery import head_size, keep_heads
from multum.core.training import accelerator

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = (
    {"role": "user", "content": "a film"},
    {"role": "assistant", "content": "wonderful"},
    {"role": "user", "content": "its plot"},
    {"role": "assistant", "content": "quite dull"},
)


@pytest.fixture(scope="module")
def writer() -> Model:
    return tiny.language_model("llama", positions=96)


def test_pieces_put_together_are_the_text_and_begin_with_words(writer: Model) -> None:
    texts = tiny.passages(20)
    for text in texts:
        found = pieces([text], writer.tokenizer, 4, 6)
        parts = [part for piece in found for part in (piece.prompt, piece.reference.text)]
        assert "".join(parts) in (text, text[: len("".join(parts))])
        assert len(text) - len("".join(parts)) < 12  # a last token alone is no piece
        assert [piece.reference.ended for piece in found[:-1]] == [False] * (len(found) - 1)
        for part in parts[1:]:
            assert part[0].isspace() or part == "."  # or no word begins soon
    assert not pieces(["a", ""], writer.tokenizer, 4, 6)
    # Without a space nearby it is cut anywhere.
    (long,) = pieces(["wonderful" * 40], writer.tokenizer, 8, 1000)
    assert long.reference.ended
    assert str(long.prompt) + long.reference.text == "wonderful" * 40


def test_rows_are_the_tokens_of_the_whole_text_and_labels_those_of_what_follows(writer: Model) -> None:
    tokenizer, module = writer.tokenizer, writer.module
    found = pieces(tiny.passages(4), tokenizer, 5, 8)
    rows = rows_of(module, tokenizer, [piece.prompt for piece in found], [piece.reference for piece in found])
    for piece, row in zip(found, rows, strict=True):
        end = [tokenizer.eos_token_id] if piece.reference.ended else []
        assert row["input_ids"] == [*tokenizer(str(piece.prompt) + piece.reference.text)["input_ids"], *end]
        prompt = tokenizer(piece.prompt)["input_ids"]  # with its BOS
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    module.config.max_position_embeddings, before = 6, module.config.max_position_embeddings
    cut = rows_of(module, tokenizer, [found[0].prompt], [found[0].reference])
    module.config.max_position_embeddings = before
    assert cut[0]["input_ids"] == rows[0]["input_ids"][:6]


def test_a_chat_is_answered_where_the_assistant_spoke_last(writer: Model) -> None:
    writer.tokenizer.chat_template = TEMPLATE
    chats: list[Any] = [CHAT, CHAT[:1]]
    (piece,) = pieces(chats, writer.tokenizer, 4, 6)
    assert piece.prompt == CHAT[:3]
    (row,) = rows_of(writer.module, writer.tokenizer, [piece.prompt], [piece.reference])
    said = "user: a film\nassistant: wonderful\nuser: its plot\nassistant: "
    assert writer.tokenizer.decode(row["input_ids"]) == said + "quite dull</s>"
    assert writer.tokenizer.decode([token for token in row["labels"] if token != -100]).strip() == "quite dull</s>"
    writer.tokenizer.chat_template = None


def greedily(model: Model, prompt: str, most: int) -> list[int]:
    ids = list(model.tokenizer(prompt)["input_ids"])
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model.module(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    return ids


def test_what_is_written_is_a_loop_over_the_tokens_whatever_the_batch(writer: Model) -> None:
    prompts = [str(piece.prompt) for piece in pieces(tiny.passages(6), writer.tokenizer, 7, 9)]
    slow = [greedily(writer, prompt, 5) for prompt in prompts]
    expected = [writer.tokenizer.decode(ids, skip_special_tokens=True)[len(p) :] for ids, p in zip(slow, prompts, strict=True)]
    for size in (1, 4):
        found = continued(writer.module, writer.tokenizer, prompts, 5, batch_size=size, do_sample=False)
        assert [one.text for one in found] == expected
    # Its first token made the end of all, a text ends there.
    end, before = slow[0][-5], writer.module.generation_config.eos_token_id
    writer.module.generation_config.eos_token_id = end
    (first,) = continued(writer.module, writer.tokenizer, prompts[:1], 5, do_sample=False)
    writer.module.generation_config.eos_token_id = before
    assert first.ended
    (none,) = continued(writer.module, writer.tokenizer, ["film " * 200], 5, do_sample=False)
    assert none == Continuation("", ended=False)


def test_what_is_drawn_depends_on_the_seed_alone_and_is_kept(writer: Model, tmp_path: Path) -> None:
    prompts, drawn = ["the film was"] * 3, []
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        with seeded(seed, 0):
            drawn.append(continued(writer.module, writer.tokenizer, prompts, 8, **AS_IT_IS))
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({one.text for one in drawn[0]}) > 1
    kept = [cached_continuations(writer, prompts, 8, tmp_path, precision="fp32", drawn=1) for _ in range(2)]
    assert kept[0] == kept[1]
    assert kept[0] == drawn[0] or accelerator() != "cpu"  # another device draws other numbers of one seed
    beams = [cached_continuations(writer, prompts, 8, tmp_path, precision="fp32", beams=count) for count in (1, 3)]
    assert len(list(tmp_path.glob("*.texts"))) == 3

    def score(text: str) -> float:
        ids = writer.tokenizer(prompts[0] + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = writer.module(ids).logits[0, :-1].log_softmax(-1)
        start = len(writer.tokenizer(prompts[0])["input_ids"]) - 1
        return float(log_p.gather(1, ids[0, 1:, None])[start:].mean())

    assert all(math.isfinite(score(one.text)) for part in beams for one in part)


def test_a_model_whose_first_layer_lost_its_attention_writes_what_it_says(writer: Model) -> None:
    model = tiny.language_model("gpt2", layers=3)
    pruned = tiny.uneven(model)
    keep_heads(blocks_of(pruned.module)[0], family_of(pruned.module), [], head_size(pruned.module))
    pruned.module.generation_config.use_cache = True
    prompt = "the film was really"
    (found,) = continued(pruned.module, pruned.tokenizer, [prompt], 4, do_sample=False)
    assert found.text == pruned.tokenizer.decode(greedily(pruned, prompt, 4), skip_special_tokens=True)[len(prompt) :]
