"""Models on disk that can be cut, and engines of one and of several processes to compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minigpt.api.requests import Delta, Request, SamplingParams
from minigpt.data.tokenizer_build import bytes_tokenizer
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.preflight import read_model_config
from minigpt.engine.resolve import kv_bytes_per_token
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.weights import save_model

SHAPE = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8,
    "intermediate_size": 64, "context_length": 128, "tie_embeddings": False, "qk_norm": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": {
        "norm": "layernorm", "position": "learned", "mlp": "gelu", "qkv_bias": True,
        "output_bias": True, "mlp_bias": True, "tie_embeddings": True,
    },
    "llama": {"num_kv_heads": 2},
    "qwen2": {"num_kv_heads": 2, "qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"num_kv_heads": 2, "qk_norm": True, "sliding_window": 24},
    "experts": {"num_experts": 4, "expert_intermediate_size": 24, "qk_norm": True},
}  # fmt: skip


def make_model(family: str, seed: int = 0, **changes: object) -> tuple[Decoder, ModelConfig]:
    """Draw a model whose choices are far from ties, with every bias away from zero."""
    ends = {"vocab_size": 257, "eos_token_id": 256}
    config = ModelConfig.model_validate(SHAPE | FAMILIES[family] | ends | changes)
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
        model.output_weight.mul_(20)
    return model.eval(), config


def write_model(directory: Path, model: Decoder, config: ModelConfig) -> Path:
    """Write a model with a byte tokenizer."""
    tokens = directory / "tokenizer"
    tokens.mkdir(parents=True)
    bytes_tokenizer().copy_to(tokens)
    save_model(directory / "model", model, config, tokenizer_dir=tokens)
    return directory / "model"


@contextmanager
def serving(
    path: Path, ranks: int = 1, num_blocks: int = 34, **changes: object
) -> Iterator[Engine]:
    """An engine of small chunks, its cache little more than a context; it ends with the block."""
    settings: dict[str, object] = {
        "device": "cpu", "dtype": "float32", "threads": 1, "block_size": 4, "max_num_seqs": 8,
        "max_batched_tokens": 16, "tensor_parallel_size": ranks,
    }  # fmt: skip
    config = EngineConfig.model_validate(settings | changes)
    size = num_blocks * config.block_size * kv_bytes_per_token(config, read_model_config(path))
    engine = Engine.load(path, config.replace(kv_cache_bytes=size))
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Answer:
    """One sequence's deltas, put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.logprobs += [entry.logprob for entry in delta.logprobs or ()]
        self.prompt_logprobs += [entry.logprob for entry in delta.prompt_logprobs or ()]
        self.embedding += delta.embedding or ()
        self.finish_reason = delta.finish_reason


Answers = dict[tuple[str, int], Answer]


def answer(engine: Engine, requests: list[Request]) -> Answers:
    """Add requests at once and step until idle."""
    found: Answers = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            found.setdefault((delta.request_id, delta.index), Answer()).extend(delta)
    return found


def ask(
    name: str, prompt: str, n: int = 1, adapter: str | None = None, **sampling: object
) -> Request:
    params = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
    return Request(
        id=name,
        prompt_token_ids=list(prompt.encode()),
        sampling=SamplingParams(**(params | sampling)),  # type: ignore[arg-type]
        n=n,
        adapter=adapter,
    )


def largest_difference(found: Answers, expected: Answers) -> float:
    """Compare answers: tokens and ends must be the same; return how far numbers are apart."""
    assert found.keys() == expected.keys()
    apart = 0.0
    for key, one in found.items():
        other = expected[key]
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason), key
        for name in ("logprobs", "prompt_logprobs", "embedding"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert len(ours) == len(theirs), (key, name)
            apart = max([apart, *(abs(a - b) for a, b in zip(ours, theirs, strict=True))])
    return apart
