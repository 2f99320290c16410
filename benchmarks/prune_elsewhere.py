"""What `prune_smollm2.py` compares with: the same model pruned by llm-compressor or by torch-pruning, without multum.

    python prune_elsewhere.py PACKAGE METHOD MODEL CALIBRATION PLACE SHARE

Reads the calibration tokens that multum gets, prunes a loaded model under the same stop-watch, saves it as PLACE/model with
PLACE/cost.json. It needs transformers and the package alone, so that it runs in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peak import Peak
from transformers import AutoModelForCausalLM, AutoTokenizer


def llmcompressor(method: str, model: Any, tokenizer: Any, blocks: list[list[int]], share: float) -> None:
    """50 % of the weights of every linear layer in the blocks."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    rows = Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=[kind(sparsity=0.5, ignore=["re:.*lm_head"])],
        num_calibration_samples=len(blocks),
        max_seq_length=len(blocks[0]),
        shuffle_calibration_samples=False,
    )


def torch_pruning(method: str, model: Any, tokenizer: Any, blocks: list[list[int]], share: float) -> None:
    """The smallest share of every block's neurons, by the norm of all weights that are theirs."""
    import torch_pruning as tp

    if method != "neurons":
        raise SystemExit(f"torch-pruning is asked for neurons only (got {method})")
    model.config.use_cache = False
    first = {part: share for block in model.model.layers for part in (block.mlp.gate_proj, block.mlp.up_proj)}
    pruner = tp.pruner.BasePruner(
        model,
        {"input_ids": torch.tensor([blocks[0][:16]])},
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=first,
        ignored_layers=[model.lm_head, *(block.self_attn for block in model.model.layers)],
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    model.config.intermediate_size = model.model.layers[0].mlp.up_proj.out_features


def main(package: str, method: str, source: str, calibration: str, place: Path, share: float) -> None:
    blocks = json.loads(Path(calibration).read_text(encoding="utf-8"))["blocks"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    bytes_ = sum(parameter.nbytes for parameter in model.parameters())
    for parameter in model.parameters():  # until then weights are pages of a file that nobody has read
        parameter.data = parameter.data.clone()
    with Peak() as peak:
        started = time.perf_counter()
        {"llmcompressor": llmcompressor, "torch_pruning": torch_pruning}[package](method, model, tokenizer, blocks, share)
        seconds = time.perf_counter() - started
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    cost = {"seconds": seconds, **peak.figures, "model_mb": bytes_ / 1e6}
    (place / "cost.json").write_text(json.dumps(cost), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:5], Path(sys.argv[5]), float(sys.argv[6]))
