"""Channels of encoder-decoders: one set for both stacks, the factors that transformers takes from the width made up for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import translators
from planted import GONE, KEPT, planted, told
from transformers import AutoModel

from multum import runtimes
from multum.core.channels import channels_of
from multum.core.families import stacks_of
from multum.core.model import Model
from multum.core.step import make
from multum.core.students import make_student
from multum.core.surgery import head_size, keep_heads
from multum.core.width import own_positions
from multum.errors import InputError
from multum.steps.prune_hidden import PruneHidden, input_moments
from multum.targets import export_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("t5", "mt5", "bart", "mbart", "marian")
SCALED = ("bart", "mbart", "marian")
"""Those whose embeddings may be scaled by the root of the width."""
AUTO = "AutoModelForSeq2SeqLM"


@pytest.fixture(scope="module")
def task() -> Any:
    return translators.translating(24, 8)


def made(family: str, **changes: Any) -> Model:
    """A tiny translator with other values in its config."""
    model = translators.translator(family, spread=2.0)
    torch.manual_seed(1)
    module = type(model.module)(type(model.module.config).from_dict(model.module.config.to_dict() | changes)).eval()
    module.load_state_dict(model.module.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
        if hasattr(module, "final_logits_bias"):
            module.final_logits_bias.normal_()
    return Model(module=module, tokenizer=model.tokenizer, source=model.source)


def inputs(module: Any) -> dict[str, torch.Tensor]:
    """Sources of two lengths, and what the decoder is to read, longer than the one and shorter than the other."""
    made = torch.Generator().manual_seed(0)
    ids, read = (torch.randint(3, module.config.vocab_size, (3, tokens), generator=made) for tokens in (9, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": read}


@torch.no_grad()
def answers(module: Any) -> torch.Tensor:
    return module(**inputs(module)).logits


def written(module: Any) -> torch.Tensor:
    read = {name: value for name, value in inputs(module).items() if not name.startswith("decoder")}
    return module.generate(**read, max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1, use_cache=True)


VARIANTS = [
    *((family, {}) for family in FAMILIES),
    *((family, {"scale_embedding": True}) for family in SCALED),
    ("t5", {"scale_decoder_outputs": False}),
    ("marian", {"scale_embedding": True, "share_encoder_decoder_embeddings": False}),
    ("bart", {"scale_embedding": True, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_channels_that_are_zero_everywhere_go_and_the_answers_stay(family, changes, task, tmp_path):
    model = made(family, **changes)
    where = channels_of(model.module, 24)
    planted(model.module, where)
    cut = PruneHidden(keep=0.75, samples=16)(model, task)
    told(cut.history[-1])
    assert torch.allclose(answers(cut.module), answers(model.module), atol=2e-4, rtol=1e-3)
    assert cut.parameters() < model.parameters()
    shared = [tables(each.module) for each in (model, cut)]
    assert shared[0] == shared[1]
    cut.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", auto_class=AUTO)
    assert again.new_weights == ()
    assert torch.equal(answers(again.module), answers(cut.module))
    assert torch.equal(written(again.module), written(cut.module))
    assert tables(again.module) == shared[0]


def tables(module: Any) -> list[list[str]]:
    """Names of parameters that are one."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return [names for names in found.values() if len(names) > 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_to_keep_all_changes_nothing(family, task):
    model = translators.translator(family)
    same = PruneHidden(keep=1.0, samples=8)(model, task)
    assert same.fingerprint() == model.fingerprint()
    assert same.settings() == model.settings()


def test_every_reader_is_looked_at_on_the_tokens_that_it_reads():
    """Keys and values of the cross-attention read the encoder's, its queries and all other parts of the decoder the decoder's."""
    module = made("marian").module
    where, batch = channels_of(module, 24), inputs(module)
    batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
    batch["decoder_attention_mask"][2, 3:] = 0
    moments = input_moments(module, where.readers, [batch])
    of_source = [name for name, each in moments.items() if each.count == 3 * 9 - 4]
    assert {each.count for name, each in moments.items() if name not in of_source} == {3 * 7 - 4}
    cross = [name for name in where.readers if "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name]
    assert sorted(of_source) == sorted([*cross, *(name for name in where.readers if ".encoder.layers" in name)])
    assert len(cross) == 4


@torch.no_grad()
def test_what_is_constant_goes_into_the_bias_of_the_logits(task):
    model = made("bart", tie_word_embeddings=False)
    model.module.lm_head.weight.normal_(std=0.2)
    planted(model.module, channels_of(model.module, 24))
    last = stacks_of(model.module)[-1].blocks[-1].final_layer_norm
    last.bias[GONE] = torch.linspace(-5.0, 5.0, 8)
    cut = PruneHidden(keep=0.75, samples=16)(model, task)
    assert cut.history[-1]["kept_hidden"] == KEPT
    assert torch.allclose(answers(cut.module), answers(model.module), atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["t5", "mbart", "marian"])
def test_what_is_cut_is_cut_further_saved_and_loaded(family, task, tmp_path):
    cut = PruneHidden(keep=0.75, samples=16)(made(family, **({"scale_embedding": True} if family != "t5" else {})), task)
    cut = make("prune_structured", {"speedup": 1.3, "samples": 16, "neuron_group": 4})(cut, task)
    cut = make("drop_layers", {"which": (1,), "stack": "decoder"})(cut, task)
    cut = PruneHidden(keep=0.67, samples=16)(cut, task)
    assert cut.history[-1]["hidden"] == [24, 16]
    assert [head_size(cut.module, stack.family) for stack in stacks_of(cut.module)] == [8, 8]
    cut.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", auto_class=AUTO)
    assert again.new_weights == ()
    assert torch.equal(answers(again.module), answers(cut.module))
    assert torch.equal(written(again.module), written(cut.module))
    again.save(tmp_path / "once more")
    assert torch.equal(answers(Model.load(tmp_path / "once more", auto_class=AUTO).module), answers(cut.module))


def test_without_the_head_it_finds_its_parts(task, tmp_path):
    cut = PruneHidden(keep=0.75, samples=16)(made("marian"), task)
    cut.save(tmp_path / "model")
    base = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert len(own_positions(base)) == 2
    with torch.no_grad():
        states = [each(**inputs(cut.module)).last_hidden_state for each in (base, cut.module.model)]
    assert torch.equal(*states)


class Asked:
    """A task with nothing but calibration texts."""

    def calibration(self, model: Model, *_: Any, **__: Any) -> list[dict[str, torch.Tensor]]:
        return [inputs(model.module)] * 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "mbart", "marian"])
def test_a_model_without_a_head_writes_what_it_wrote(family, tmp_path):
    whole = made(family, **({} if family == "t5" else {"scale_embedding": True}))
    torch.manual_seed(2)
    module = AutoModel.from_config(whole.module.config).eval()
    model = Model(module=planted(module, channels_of(module, 24)), tokenizer=whole.tokenizer, source="tiny")
    cut = PruneHidden(keep=0.75)(model, Asked())
    assert tables(cut.module) == tables(module)
    cut.save(tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model").eval()
    before, after, loaded = (each(**inputs(module)).last_hidden_state for each in (module, cut.module, again))
    assert torch.allclose(after, before[..., KEPT], atol=2e-4, rtol=1e-3)
    assert torch.equal(loaded, after)


STOCK = """
import sys, torch
from transformers import AutoModelForSeq2SeqLM
torch.set_grad_enabled(False)
for folder in sys.argv[1:]:
    inputs, logits = torch.load(f"{folder}/asked.pt", weights_only=True)
    try:
        found = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()(**inputs).logits
    except RuntimeError as error:
        print("refused" if "mismatched" in str(error) else error)
        continue
    print("equal" if torch.equal(found, logits) else f"off-by-{(found - logits).abs().max()}")
assert "multum" not in sys.modules
"""


def test_without_multum_it_is_loaded_right_or_refused(task, tmp_path):
    """T5 states all that is left of it; the others only where their heads fill the width, and then Marian's own positions are read
    from the file."""
    wanted, folders = [], []
    for family, filled in (("t5", False), ("marian", False), ("marian", True), ("bart", True)):
        cut = PruneHidden(keep=0.75, samples=16)(made(family, **({"scale_embedding": True} if family != "t5" else {})), task)
        for stack in stacks_of(cut.module) if filled else ():
            for block in stack.blocks:
                for row in filter(None, (stack.family, stack.family.cross)):
                    keep_heads(block, row, [0, 1, 3], 8)
        folder = tmp_path / f"{family}{filled}"
        stock = cut.save(folder)
        assert stock is (family != "marian" and (filled or family == "t5"))
        config = json.loads((folder / "config.json").read_text())
        assert ("head_dim" in config) == (family != "t5" and not filled)
        if filled:
            assert config["encoder_attention_heads"] == config["decoder_attention_heads"] == 3
        torch.save((inputs(cut.module), answers(cut.module)), folder / "asked.pt")
        wanted.append("equal" if filled or family == "t5" else "refused")
        folders.append(str(folder))
        again = Model.load(folder, auto_class=AUTO)
        assert bool(own_positions(again.module)) == (family == "marian")
        assert torch.equal(answers(again.module), answers(cut.module))
    done = subprocess.run([sys.executable, "-c", STOCK, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.split() == wanted


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_reconstruct_compares_both_stacks_on_the_kept_channels(family, task, tmp_path):
    whole = made(family, **({"scale_embedding": True} if family == "marian" else {}))
    whole.save(tmp_path / "whole")
    whole = Model.load(tmp_path / "whole", auto_class=AUTO)
    cut = PruneHidden(keep=0.75, samples=24)(whole, task)
    repaired = make("reconstruct", {"teacher": str(tmp_path / "whole"), "samples": 24})(cut, task)
    assert repaired.history[-1]["teacher_blocks"] == [0, 1, 2, 3]
    kept = cut.history[-1]["kept_hidden"]

    @torch.no_grad()
    def streams(one: Model) -> torch.Tensor:
        """What the last block of the decoder has put on the stream before any norm."""
        row, seen = stacks_of(one.module)[-1], []
        part = row.blocks[-1].get_submodule(row.family.feed_forward_norm)
        hook = part.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for batch in task.calibration(one, 24):
            one.module(**batch)
        hook.remove()
        return torch.cat(seen)

    wanted = streams(whole)[:, kept]
    apart = [float((streams(one) - wanted).square().sum()) for one in (cut, repaired)]
    assert apart[1] < 0.95 * apart[0]


def test_it_is_exported_and_writes_the_same(task, tmp_path):
    """The export proves its logits against torch by itself."""
    cut = PruneHidden(keep=0.75, samples=16)(made("marian", scale_embedding=True), task)
    config = cut.module.generation_config
    config.num_beams, config.max_new_tokens, config.max_length = 1, 8, None
    cut.save(tmp_path / "model")
    cut = Model.load(tmp_path / "model", auto_class=AUTO)
    parity = export_model(runtimes.find("onnxruntime"), cut, tmp_path / "out", "fp32", task, 0)
    assert parity["written_agreement"] == 1.0


def test_a_student_of_another_width_has_positions_and_heads_of_its_own(task):
    cut = PruneHidden(keep=0.75, samples=16)(made("marian"), task)
    student, _ = make_student(cut, {"hidden_size": 16}, task)
    assert head_size(student.module) == 4
    assert own_positions(student.module) == []
    assert torch.isfinite(answers(student.module)).all()


class Untouched:
    """A task that nothing may be asked of."""

    def calibration(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the step worked before it refused")


def test_heads_of_two_sizes_are_refused():
    model = made("bart", decoder_attention_heads=2)
    with pytest.raises(InputError, match=r"^prune_hidden: .*8 and 16") as caught:
        PruneHidden(keep=0.75)(model, Untouched())
    assert len(caught.value.problems) == 1
