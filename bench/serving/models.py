"""The two measured models, and texts of an exact number of tokens.

Llama-shaped, random weights, GPT-2's vocabulary from the shared data. The same weights go to
every peer: as a Hugging Face directory, and as GGUF files converted from it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench.harness import SHARED_DATA
from bench.serving.venvs import python_of

SHAPES: dict[str, dict[str, int]] = {
    "124M": {
        "num_layers": 12, "hidden_size": 768, "num_heads": 12, "num_kv_heads": 12,
        "head_dim": 64, "intermediate_size": 2048,
    },
    "429M": {
        "num_layers": 24, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 8,
        "head_dim": 64, "intermediate_size": 4096,
    },
}  # fmt: skip
VOCAB_SIZE = 50257
CONTEXT_LENGTH = 1024
GGUF_TYPES = {"bf16": "BF16", "8": "Q8_0", "4": "Q4_0"}


def make_model(directory: Path, shape: str) -> Path:
    """Write the bf16 model as a Hugging Face directory, once."""
    if (directory / "complete").exists():
        return directory
    import torch

    from minigpt.data.tokenizer import Tokenizer
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder
    from minigpt.model.weights import save_model

    directory.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = directory.parent / f"{shape}-tokenizer"
    tokenizer.mkdir(exist_ok=True)
    Tokenizer.load(SHARED_DATA / "gpt2-tokenizer").copy_to(tokenizer)
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        context_length=CONTEXT_LENGTH,
        qk_norm=False,
        norm_eps=1e-5,
        eos_token_id=VOCAB_SIZE - 1,
        **SHAPES[shape],
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(directory, model.bfloat16(), config, tokenizer)
    # What transformers and vLLM want besides: which class reads tokenizer.json.
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "model_max_length": CONTEXT_LENGTH,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    (directory / "complete").touch()
    return directory


def make_quantized(directory: Path, source: Path, group_size: int | None = None) -> Path:
    """Quantize the model as `minigpt compress` does: int8, or int4 in groups."""
    if (directory / "complete").exists():
        return directory
    from minigpt.model.linear import quantize_module
    from minigpt.model.weights import load_model, save_model

    loaded = load_model(source, dtype="bfloat16")
    quantize_module(loaded.model, group_size)
    save_model(directory, loaded.model, loaded.config, source)
    (directory / "complete").touch()
    return directory


def make_gguf(path: Path, source: Path, kind: str, venv: Path) -> Path:
    """Convert, and for 8 and 4 bits quantize with llama.cpp's own quantizer, once."""
    if not path.exists():
        script = Path(__file__).with_name("to_gguf.py")
        command = [*map(str, (python_of(venv), script, source, path)), GGUF_TYPES[kind]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def prompts(length: int) -> Iterator[str]:
    """Yield real texts, no two alike, that are `length` tokens in the GPT-2 vocabulary."""
    from minigpt.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(SHARED_DATA / "gpt2-tokenizer")
    ids = tokenizer.encode((SHARED_DATA / "tinyshakespeare.txt").read_text())
    for start in range(0, len(ids) - length, length):
        text = tokenizer.decode(ids[start : start + length])
        if len(tokenizer.encode(text)) == length:
            yield text
