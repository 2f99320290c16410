"""Trimmed vocabularies read the training texts as before, to the bit, and no text loses a word to [UNK]."""

from __future__ import annotations

import json
import random
import string
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import translators
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

from multum.core.model import Model
from multum.errors import InputError
from multum.steps.trim_vocabulary import TrimVocabulary, ancestors, count_tokens, needed, obstacle, pieces, renumber, token_ids
from multum.tasks.translation import Translation

FAMILY_NAMES = ["bert", "distilbert", "roberta", "electra", "xlm-roberta"]
UNKNOWN = "[UNK]"
FOREIGN = "äöüßéèñçøåžđłőяжщбдфγλπσ中文字日本あいうㄱ한글ابتشहिन्दी‽…—“”😀🎬\u200b\u0301\x07\t\u00a0"


@pytest.fixture(scope="module")
def task():
    return tiny.task(n_train=24)


def sentencepiece_model() -> Model:
    """XLM-R with a Unigram vocabulary that knows more than the task's texts."""
    corpus = [*tiny.task(seed=5).inputs("train"), *WORDS * 3]
    vocab = json.loads(tiny.unigram(corpus, 300).to_str())["model"]["vocab"]
    tokenizer = XLMRobertaTokenizer(vocab=[(token, score) for token, score in vocab], model_max_length=64)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=66,
    )
    return Model(module=XLMRobertaForSequenceClassification(config).eval(), tokenizer=tokenizer, source="tiny")


WORDS = ["elephants unusual quicksand zebra xylophone", "jumping over lazy dogs, 1984 & 2001!", "Kubrick's über-café naïve"]


def make(name: str) -> Model:
    return sentencepiece_model() if name == "xlm-roberta" else tiny.model(name)


def random_texts(tokenizer, count: int, seed: int = 0) -> list[str]:
    """Pieces of the vocabulary glued together, ASCII noise and letters of many scripts."""
    rng = random.Random(seed)
    tokens = [token.removeprefix("##").replace("▁", " ").replace("Ġ", " ") for token in tokenizer.get_vocab()]
    sources = [lambda: rng.choice(tokens), lambda: rng.choice(string.printable), lambda: rng.choice(FOREIGN)]
    return ["".join(rng.choice(sources)() for _ in range(rng.randrange(1, 20))) for _ in range(count)]


def tokens_of(tokenizer, texts) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in texts]


@torch.no_grad()
def logits(module, tokenizer, texts) -> torch.Tensor:
    return module(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_training_texts_read_as_before_and_answers_are_equal_to_the_bit(name, task, tmp_path):
    model = make(name)
    trimmed = TrimVocabulary()(model, task)
    before, after = trimmed.history[-1]["vocabulary"]
    width = model.module.get_input_embeddings().embedding_dim
    assert after < before == len(model.tokenizer)
    assert trimmed.history[-1]["bytes_saved"] == (before - after) * width * 4
    assert len(trimmed.tokenizer) == after == trimmed.module.config.vocab_size
    assert trimmed.module.get_input_embeddings().num_embeddings == after
    assert model.parameters() - trimmed.parameters() == (before - after) * width
    trimmed.save(tmp_path / "trimmed")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trimmed")
    texts = task.inputs("train")
    assert tokens_of(tokenizer, texts) == tokens_of(trimmed.tokenizer, texts) == tokens_of(model.tokenizer, texts)
    expected = logits(model.module, model.tokenizer, texts)
    assert torch.equal(logits(trimmed.module, trimmed.tokenizer, texts), expected)
    assert torch.equal(logits(module, tokenizer, texts), expected)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_no_text_gains_an_unknown_token(name, task, tmp_path):
    model = make(name)
    TrimVocabulary(min_count=3)(model, task).save(tmp_path / "trimmed")
    old, new = model.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    seen = 0
    for text in random_texts(old, 2000):
        unknown = old(text)["input_ids"].count(old.unk_token_id)
        assert new(text)["input_ids"].count(new.unk_token_id) <= unknown, text
        seen += unknown
    assert seen > 0 or name == "roberta"  # bytes spell everything


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_ids_are_dense_in_the_old_order_and_name_the_same_rows(name, task):
    model = make(name)
    trimmed = TrimVocabulary()(model, task)
    old, new = model.tokenizer.get_vocab(), trimmed.tokenizer.get_vocab()
    assert sorted(new.values()) == list(range(len(new)))
    assert sorted(new, key=new.get) == sorted(new, key=old.get)
    table, small = (m.module.get_input_embeddings().weight for m in (model, trimmed))
    for token, index in new.items():
        assert torch.equal(small[index], table[old[token]])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_special_tokens_keep_their_roles(name, task):
    model = make(name)
    trimmed = TrimVocabulary()(model, task)
    old, new = model.tokenizer, trimmed.tokenizer
    assert new.all_special_tokens == old.all_special_tokens
    for role in ("pad", "unk", "cls", "sep", "mask"):
        token = getattr(old, f"{role}_token")
        assert getattr(new, f"{role}_token") == token
        if token is None:
            continue
        assert new.convert_tokens_to_ids(token) == getattr(new, f"{role}_token_id")
        assert new.convert_ids_to_tokens(getattr(new, f"{role}_token_id")) == token
    assert trimmed.module.config.pad_token_id == new.pad_token_id
    assert trimmed.module.get_input_embeddings().padding_idx == new.pad_token_id
    text, pair = task.inputs("train")[:2]
    assert tokens_of(new, [text]) == tokens_of(old, [text])
    assert new.convert_ids_to_tokens(new(text, pair)["input_ids"]) == old.convert_ids_to_tokens(old(text, pair)["input_ids"])


def test_padding_that_is_not_the_first_token_moves_with_the_ids(task):
    """The real BERT vocabulary has [UNK] at 100: ids of special tokens change."""
    model = with_tokens_first(tiny.model(), 50)
    trimmed = TrimVocabulary()(model, task)
    assert model.tokenizer.pad_token_id == model.module.config.pad_token_id == 50
    assert trimmed.tokenizer.pad_token_id == trimmed.module.config.pad_token_id < 50
    assert trimmed.module.get_input_embeddings().padding_idx == trimmed.tokenizer.pad_token_id
    texts = task.inputs("train")
    assert tokens_of(trimmed.tokenizer, texts) == tokens_of(model.tokenizer, texts)
    assert torch.equal(logits(trimmed.module, trimmed.tokenizer, texts), logits(model.module, model.tokenizer, texts))


def test_roberta_positions_start_where_they_did(task):
    """RoBERTa numbers positions from its padding id, so that id must not move."""
    model = with_tokens_first(tiny.model("roberta"), 3)
    assert model.module.config.pad_token_id == 4
    trimmed = TrimVocabulary()(model, task)
    assert trimmed.history[-1]["vocabulary"][1] < trimmed.history[-1]["vocabulary"][0]
    assert trimmed.module.config.pad_token_id == trimmed.tokenizer.pad_token_id == 4
    again = type(model.module)(trimmed.module.config)
    assert again.roberta.embeddings.padding_idx == 4


def with_tokens_first(model: Model, count: int) -> Model:
    """The same model with `count` unused tokens put before all others."""
    spec = json.loads(model.tokenizer.backend_tokenizer.to_str())
    unused = {f"[unused{number}]": number for number in range(count)}
    spec["model"]["vocab"] = {**unused, **{token: index + count for token, index in spec["model"]["vocab"].items()}}
    for added in spec["added_tokens"]:
        added["id"] += count
    for key in ("sep", "cls"):
        if key in spec["post_processor"]:
            spec["post_processor"][key][1] += count
    for entry in spec["post_processor"].get("special_tokens", {}).values():
        entry["ids"] = [index + count for index in entry["ids"]]
    model.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    table = model.module.get_input_embeddings().weight.detach()
    model.module.set_input_embeddings(
        torch.nn.Embedding(len(table) + count, table.shape[1], padding_idx=model.tokenizer.pad_token_id)
    )
    with torch.no_grad():
        model.module.get_input_embeddings().weight[count:] = table
    model.module.config.vocab_size = len(table) + count
    model.module.config.pad_token_id = model.tokenizer.pad_token_id
    return model


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_minimal_vocabulary_is_left_alone(name, task):
    once = TrimVocabulary()(make(name), task)
    twice = TrimVocabulary()(once, task)
    assert twice.fingerprint() == once.fingerprint()
    assert twice.history[-1]["unchanged"] == "every token is needed"
    assert twice.history[-1]["summary"] == "vocabulary unchanged: every token is needed"
    assert twice.history[-1]["bytes_saved"] == 0


def test_min_count_drops_rare_tokens_but_spells_them(task):
    model = tiny.model()
    once, often = TrimVocabulary()(model, task), TrimVocabulary(min_count=10)(model, task)
    assert often.history[-1]["vocabulary"][1] < once.history[-1]["vocabulary"][1]
    counts = count_tokens(json.loads(model.tokenizer.backend_tokenizer.to_str()), task.inputs("train"))
    for token in once.tokenizer.get_vocab().keys() - often.tokenizer.get_vocab().keys():
        assert 0 < counts[model.tokenizer.convert_tokens_to_ids(token)] < 10
        assert len(token.removeprefix("##")) > 1


def test_extra_texts_keep_their_tokens(task, tmp_path):
    model = tiny.model()
    rare = [t for t in model.tokenizer.get_vocab() if t.isalpha() and len(t) > 2]
    dropped = sorted(set(rare) - TrimVocabulary()(model, task).tokenizer.get_vocab().keys())
    assert dropped
    (tmp_path / "served.txt").write_text("\n".join(dropped), encoding="utf-8")
    kept = TrimVocabulary(extra_texts=str(tmp_path / "served.txt"))(model, task)
    assert tokens_of(kept.tokenizer, dropped) == tokens_of(model.tokenizer, dropped)


def test_unlabelled_texts_keep_their_tokens(task):
    model = tiny.model()
    words = {t for t in model.tokenizer.get_vocab() if t.isalpha() and len(t) > 2}
    dropped = sorted(words - TrimVocabulary()(model, task).tokenizer.get_vocab().keys())
    assert dropped
    kept = TrimVocabulary()(model, replace(task, unlabelled=dropped))
    assert tokens_of(kept.tokenizer, dropped) == tokens_of(model.tokenizer, dropped)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read .*: No such file"), (b"caf\xe9", "is not UTF-8")])
def test_extra_texts_that_cannot_be_read(content, message, task, tmp_path):
    path = tmp_path / "served.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        TrimVocabulary(extra_texts=str(path))(tiny.model(), task)


def test_tokens_added_later_stay(task):
    model = tiny.model()
    model.tokenizer.add_tokens([AddedToken("multumword"), AddedToken("<user>", special=True)])
    model.module.resize_token_embeddings(len(model.tokenizer))
    trimmed = TrimVocabulary()(model, task)
    text = "the multumword of <user> is great"
    assert tokens_of(trimmed.tokenizer, [text])[0].count("multumword") == 1
    assert "<user>" in tokens_of(trimmed.tokenizer, [text])[0]
    assert trimmed.tokenizer.convert_tokens_to_ids("<user>") == len(trimmed.tokenizer) - 1


def test_embeddings_that_no_token_has_are_dropped(task):
    model = tiny.model()
    plain = TrimVocabulary()(model, task)
    model.module.resize_token_embeddings(len(model.tokenizer) + 13)
    padded = TrimVocabulary()(model, task)
    assert padded.module.config.vocab_size == plain.module.config.vocab_size


def test_pairs_of_texts_count(task):
    model = tiny.model()
    pairs = tiny.task(n_train=24, pairs=True)
    trimmed = TrimVocabulary()(model, pairs)
    for first, second in pairs.inputs("train"):
        old, new = model.tokenizer(first, second), trimmed.tokenizer(first, second)
        assert trimmed.tokenizer.convert_ids_to_tokens(new["input_ids"]) == model.tokenizer.convert_ids_to_tokens(old["input_ids"])


def test_a_tied_language_head_keeps_the_same_rows(task):
    classifier = tiny.model()
    torch.manual_seed(0)
    model = Model(module=BertForMaskedLM(classifier.module.config).eval(), tokenizer=classifier.tokenizer, source="tiny")
    torch.nn.init.normal_(model.module.cls.predictions.bias)
    trimmed = TrimVocabulary()(model, task)
    texts = task.inputs("train")[:4]
    old, new = model.tokenizer.get_vocab(), trimmed.tokenizer.get_vocab()
    kept = [old[token] for token in sorted(new, key=new.get)]
    before, after = logits(model.module, model.tokenizer, texts), logits(trimmed.module, trimmed.tokenizer, texts)
    torch.testing.assert_close(after, before[..., kept], rtol=1e-5, atol=1e-6)
    assert trimmed.module.get_output_embeddings().weight is trimmed.module.get_input_embeddings().weight


def test_bytes_of_a_head_of_its_own_are_counted_too(task):
    model = tiny.language_model("llama")
    assert model.module.get_output_embeddings().weight is not model.module.get_input_embeddings().weight
    entry = TrimVocabulary()(model, task).history[-1]
    before, after = entry["vocabulary"]
    assert entry["bytes_saved"] == 2 * (before - after) * model.module.config.hidden_size * 4 > 0
    assert entry["summary"].startswith(f"{before} -> {after} tokens, ")


# The pure functions, on vocabularies small enough to see.


def spec_of(model) -> dict:
    return json.loads(Tokenizer(model).to_str())


def word_piece(*tokens: str) -> dict:
    spec = spec_of(models.WordPiece({token: i for i, token in enumerate(("[UNK]", *tokens))}, unk_token=UNKNOWN))
    spec["added_tokens"] = [
        {"id": 0, "content": UNKNOWN, "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    return spec


def test_pieces():
    assert pieces({"continuing_subword_prefix": "##"}, "abc") == ["a", "##b", "##c"]
    assert pieces({"continuing_subword_prefix": "##"}, "##ab") == ["##a", "##b"]
    assert pieces({"continuing_subword_prefix": "##"}, "##") == ["#", "###"]
    assert pieces({"end_of_word_suffix": "</w>"}, "ab</w>") == ["a", "b</w>"]
    assert pieces({"continuing_subword_prefix": None}, "ab") == ["a", "b"]


def test_ancestors_are_all_the_ways_to_a_token():
    model = {"merges": [["a", "b"], ["c", "d"], ["ab", "cd"], ["b", "cd"], ["a", "bcd"], ["x", "y"]]}
    assert ancestors(model, {"abcd"}) == {"ab", "cd", "a", "b", "c", "d", "bcd"}
    assert ancestors({"merges": [["a", "##b"], ["ab", "##c"]], "continuing_subword_prefix": "##"}, {"abc"}) == {
        "ab",
        "##c",
        "a",
        "##b",
    }
    assert ancestors(model, {"a"}) == set()


def test_a_token_that_its_characters_do_not_spell_is_an_obstacle_for_longest_match():
    """`abcx` is ab + ##cx. Without `ab` the longest match is a + ##bc, and nothing takes x."""
    whole = word_piece("a", "b", "c", "##a", "##b", "##c", "ab", "##bc", "##cx")
    cut, _ = renumber(whole, token_ids(whole).keys() - {"ab"})
    assert Tokenizer.from_str(json.dumps(whole)).encode("abcx").tokens == ["ab", "##cx"]
    assert Tokenizer.from_str(json.dumps(cut)).encode("abcx").tokens == ["[UNK]"]
    assert "'##cx' has characters" in obstacle(whole)


def test_a_character_that_only_begins_tokens_is_no_obstacle_but_its_tokens_stay():
    spec = word_piece("a", "b", "##a", "##b", "##xa", "##xab", "xb", "ab")
    assert obstacle(spec) is None
    kept = needed(spec, {}, 1)
    assert {"##xa", "##xab", "xb"} <= kept
    assert "ab" not in kept
    old, new = (Tokenizer.from_str(json.dumps(s)) for s in (spec, renumber(spec, kept)[0]))
    rng = random.Random(0)
    known = 0
    for _ in range(3000):
        word = "".join(rng.choice("abx") for _ in range(rng.randrange(1, 9)))
        known += old.encode(word).tokens != ["[UNK]"]
        assert new.encode(word).tokens.count("[UNK]") <= old.encode(word).tokens.count("[UNK]"), word
    assert known > 100


def test_random_word_piece_vocabularies_never_lose_a_word():
    """Vocabularies of any shape: where nothing stands in the way, every word that could be spelled still can be."""
    rng, words = random.Random(0), ["".join("abc"[number // 3**i % 3] for i in range(6)) for number in range(3**6)]
    dropped = 0
    for _ in range(150):
        tokens = {"".join(rng.choice("abc") for _ in range(rng.choice((1, 1, 2, 3)))) for _ in range(12)}
        spec = word_piece(*sorted(token if rng.random() < 0.4 else f"##{token}" for token in sorted(tokens | set("abc"))))
        if obstacle(spec):
            continue
        kept = needed(spec, {rng.randrange(14): 1 for _ in range(3)}, 1)
        dropped += len(token_ids(spec)) - len(kept)
        old, new = (Tokenizer.from_str(json.dumps(s)) for s in (spec, renumber(spec, kept)[0]))
        for word in words:
            assert new.encode(word).tokens.count("[UNK]") <= old.encode(word).tokens.count("[UNK]"), (word, spec)
    assert dropped > 20


def test_a_word_level_vocabulary_is_left_as_it_is(task):
    model = tiny.model()
    level = Tokenizer(models.WordLevel({"[UNK]": 0, "film": 1, "never": 2}, unk_token=UNKNOWN))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    model.tokenizer._tokenizer = level
    result = TrimVocabulary()(model, task)
    assert "WordLevel vocabulary has no pieces" in result.history[-1]["unchanged"]
    assert result.module.config.vocab_size == model.module.config.vocab_size


def test_byte_pieces_and_the_lowest_score_of_unigram_stay():
    vocab = [("<unk>", 0.0), ("<0x41>", -9.0), ("▁", -2.0), ("a", -3.0), ("b", -3.0), ("ab", -2.5), ("ba", -11.0), ("bab", -4.0)]
    spec = spec_of(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    assert obstacle(spec) is None
    assert needed(spec, {5: 1}, 1) == {"<unk>", "<0x41>", "▁", "a", "b", "ab", "ba"}
    small, new = renumber(spec, needed(spec, {5: 1}, 1))
    assert small["model"]["unk_id"] == 0
    assert new == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6}


def test_renumbering_reaches_padding_and_every_processor():
    spec = word_piece("a", "zz", "[CLS]", "[SEP]", "[PAD]")
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[PAD]"])
    padding = "[PAD]"
    tokenizer.enable_padding(pad_id=5, pad_token=padding)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]),
        ]
    )
    tokenizer.normalizer, tokenizer.decoder = normalizers.Lowercase(), decoders.WordPiece()
    small, new = renumber(json.loads(tokenizer.to_str()), token_ids(spec).keys() - {"zz"})
    assert new == {0: 0, 1: 1, 3: 2, 4: 3, 5: 4}
    texts = Tokenizer.from_str(json.dumps(small)).encode_batch(["a", "a a"])
    assert [text.ids for text in texts] == [[2, 1, 3, 4][: len(texts[0].ids)], texts[1].ids]
    assert small["padding"]["pad_id"] == 4
    assert Tokenizer.from_str(json.dumps(small)).token_to_id("[PAD]") == 4


@pytest.mark.parametrize("fields", [{"min_count": 0}, {"min_count": -1}])
def test_bad_fields(fields):
    with pytest.raises(InputError, match="trim_vocabulary: min_count must be at least 1"):
        TrimVocabulary(**fields)


def test_a_tokenizer_that_is_larger_than_the_embeddings_is_an_input_error(task):
    model = tiny.model()
    model.tokenizer.add_tokens(["multumword"])
    with pytest.raises(InputError, match="the model only"):
        TrimVocabulary()(model, task)


def writer(kind: str, name: str, **more: object) -> Model:
    """An encoder-decoder with the tokenizer of another tiny model."""
    tokenizer = make(name).tokenizer
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    ids |= {"decoder_start_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.pad_token_id, "forced_eos_token_id": None}
    torch.manual_seed(0)
    if kind == "t5":
        module = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, **ids))
    else:
        sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))}
        kinds = {"bart": (BartConfig, BartForConditionalGeneration), "marian": (MarianConfig, MarianMTModel)}
        config, of = kinds[kind]
        module = of(config(d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes, **ids, **more))
        module.final_logits_bias.normal_()
    module.config.prefix = "quite dull: "
    module.generation_config.bad_words_ids = [[tokenizer.pad_token_id]]
    return Model(module=module.eval(), tokenizer=tokenizer, source="tiny")


def translating(read: list[str], written: list[str]) -> Translation:
    def rows(begin: int, end: int | None) -> Dataset:
        return Dataset.from_list([{"source": a, "target": b} for a, b in zip(read[begin:end], written[begin:end], strict=True)])

    data = {"train": rows(0, None), "validation": rows(0, 2), "test": rows(2, 4)}
    return Translation.from_splits(SimpleNamespace(**data, notes=[], fingerprints={}))


@pytest.mark.parametrize(("kind", "name"), [("t5", "xlm-roberta"), ("bart", "roberta"), ("bart", "bert"), ("marian", "bert")])
def test_encoder_decoders_keep_what_they_read_and_what_they_write(kind, name, tmp_path):
    texts = tiny.splits(24, 8, 8).train["text"]
    read, written = texts[:12], texts[12:24]
    task, model = translating(read, written), writer(kind, name)
    trimmed = TrimVocabulary()(model, task)
    before, after = trimmed.history[-1]["vocabulary"]
    assert after < before
    assert (kind == "t5") or trimmed.module.lm_head.out_features == len(trimmed.module.lm_head.weight) == after
    trimmed.save(tmp_path / "trimmed")
    again = Model.load(tmp_path / "trimmed", auto_class="AutoModelForSeq2SeqLM")
    old, new = model.tokenizer.get_vocab(), again.tokenizer.get_vocab()
    kept = [old[token] for token in sorted(new, key=new.get)]
    gone = sorted(set(range(before)) - set(kept))
    texts = ["quite dull: " + text for text in read]
    assert tokens_of(again.tokenizer, texts) == tokens_of(model.tokenizer, texts)
    assert tokens_of(again.tokenizer, written) == tokens_of(model.tokenizer, written)
    for ours, theirs in zip(*(task.batches(each, "train", 4) for each in (again, model)), strict=True):
        with torch.no_grad():
            logits_of = [each.module(**batch).logits for each, batch in ((again, ours), (model, theirs))]
        torch.testing.assert_close(logits_of[0], logits_of[1][..., kept], rtol=1e-5, atol=1e-5)
    for text in texts[:4]:
        made = again.module.generate(**again.tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        ids = model.tokenizer(text, return_tensors="pt")
        wanted = model.module.generate(**ids, max_new_tokens=6, do_sample=False, suppress_tokens=gone)
        assert again.tokenizer.batch_decode(made) == model.tokenizer.batch_decode(wanted)
    settings = again.module.generation_config
    assert settings.bad_words_ids == [[again.tokenizer.pad_token_id]]
    assert (settings.pad_token_id, settings.eos_token_id) == (again.tokenizer.pad_token_id, again.tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("kind", "more"), [("bart", {"tie_word_embeddings": False}), ("marian", {"share_encoder_decoder_embeddings": False})]
)
def test_stacks_with_tables_of_their_own_are_left_as_they_are(kind, more):
    texts, model = tiny.splits(24, 8, 8).train["text"], writer(kind, "bert", **more)
    trimmed = TrimVocabulary()(model, translating(texts[:12], texts[12:24]))
    assert trimmed.fingerprint() == model.fingerprint()
    assert trimmed.history[-1]["unchanged"] == "encoder and decoder have tables of their own"


def test_word_level_encoder_decoders_are_left_as_they_are():
    model = translators.translator()
    trimmed = TrimVocabulary()(model, translators.translating())
    assert trimmed.fingerprint() == model.fingerprint()
    assert "no pieces" in trimmed.history[-1]["unchanged"]
