"""Translation: sentences in one language, their translations in another.

Quality is corpus BLEU as sacreBLEU computes it (Papineni et al. 2002; Post 2018, arXiv:1804.08771), 0 to 100, with its signature;
beside it chrF. The interval is a bootstrap over sentences, whose own n-gram statistics are summed (Koehn 2004, Statistical
significance tests for machine translation evaluation). BLEU counts words; in languages without spaces characters stand for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..core.generation import PREFIX, prefix_of, texts_of
from ..core.model import Model
from ..core.task import Quality, SplitName
from ..core.words import UNSPACED
from ..errors import InputError
from ._generation import GenerationTask, needed
from ._interval import bootstrap

ORDER = 4
"""n-grams up to this length count."""


@dataclass(frozen=True, kw_only=True)
class Translation(GenerationTask):
    """Sentences and translations of the three splits."""

    name: ClassVar[str] = "translation"
    columns: ClassVar[tuple[str, ...]] = ("source", "target")
    keys: ClassVar[tuple[str, ...]] = ("source",)

    languages: tuple[str, str] | None = None
    """From and to, by the codes of the model's tokenizer; only models of many languages need them."""

    def own_prefix(self, config: Any) -> str:
        """T5's entries are named after both languages; the only one, where none are given."""
        known: Mapping[str, Any] = getattr(config, "task_specific_params", None) or {}
        found = {name: value for name, value in known.items() if name.startswith("translation_")}
        wanted = found.get(f"translation_{'_to_'.join(self.languages)}", {}) if self.languages else {}
        if not self.languages and len(found) == 1:
            (wanted,) = found.values()
        return prefix_of(config) or str(wanted.get(PREFIX, ""))

    def speak(self, model: Model) -> None:
        """Languages by their codes, where the tokenizer has any.

        Raises:
            InputError: it does not know one.
        """
        tokenizer = model.tokenizer
        if not self.languages or not hasattr(tokenizer, "src_lang"):
            return
        codes = [str(getattr(tokenizer, "lang_code_to_token", {}).get(code, code)) for code in self.languages]
        numbers = [tokenizer.convert_tokens_to_ids(code) for code in codes]
        unknown = [code for code, number in zip(self.languages, numbers, strict=True) if number in (None, tokenizer.unk_token_id)]
        if unknown:
            raise InputError(*(f"{model.source}: its tokenizer knows no language {code!r}" for code in unknown))
        tokenizer.src_lang, tokenizer.tgt_lang = self.languages
        model.module.generation_config.forced_bos_token_id = numbers[1]

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """BLEU and chrF of texts as numbers (`core/generation`), (sentences, 2 + characters)."""
        metrics = needed("sacrebleu.metrics")
        written, truth = texts_of(predictions), list(self.references[split])
        bleu = metrics.BLEU(tokenize=_tokenizer(truth))
        value, chrf = bleu.corpus_score(written, [truth]), metrics.CHRF()
        singles = (bleu.corpus_score([text], [[reference]]) for text, reference in zip(written, truth, strict=True))
        sums = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in singles])

        def of(sums: np.ndarray) -> np.ndarray:
            return np.array([_bleu(metrics.BLEU, row) for row in sums])

        return Quality(
            metric="bleu",
            value=float(value.score),
            ci95=bootstrap(sums, of),
            n=len(truth),
            others={"chrf": float(chrf.corpus_score(written, [truth]).score), "signature": str(bleu.get_signature())},
        )

    def drop(self, before: Quality, after: Quality) -> float:
        """Points of BLEU lost."""
        return before.value - after.value

    def drop_of(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
        """The same from two `metrics.json`."""
        return float(before["quality"]["value"]) - float(after["quality"]["value"])


def _bleu(metric: Any, sums: np.ndarray) -> float:
    """BLEU of summed statistics: matches and n-grams of each order, words written, words of the references."""
    numbers = [round(float(value)) for value in sums]
    return float(
        metric.compute_bleu(
            correct=numbers[:ORDER], total=numbers[ORDER : 2 * ORDER], sys_len=numbers[-2], ref_len=numbers[-1], smooth_method="exp"
        ).score
    )


def _tokenizer(references: list[str]) -> str:
    """sacreBLEU's name for what splits these texts into words."""
    text = "".join(references[:1000])
    share = len(re.findall(f"[{UNSPACED}]", text)) / max(len(re.findall(r"\w", text)), 1)
    if share < 0.5:
        return "13a"
    return "char" if re.search("[\u0e00-\u17ff\u3040-\u30ff]", text) else "zh"
