from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.kernels.conftest import level as level
from tests.kernels.conftest import threads as threads

from minigpt.api.requests import Delta, Request
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.resolve import kv_bytes_per_token
from minigpt.model.attention import CausalAttention
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import DraftHeads

VOCAB_SIZE = 259
EOS = 256


class ByteVocabulary:
    """One token a byte, then end of text, then two that the tokenizer does not know."""

    vocab_size = 257
    eos_token_id: int | None = EOS

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""


MakeModel = Callable[..., Decoder]
MakeEngine = Callable[..., Engine]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_model() -> MakeModel:
    def make(seed: int = 0, **changes: object) -> Decoder:
        shape: dict[str, object] = {
            "vocab_size": VOCAB_SIZE,
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
            "context_length": 128,
            "tie_embeddings": False,
            "eos_token_id": EOS,
        }
        model = Decoder(ModelConfig.model_validate(shape | changes))
        model.init_weights(torch.Generator().manual_seed(seed))
        # Wide output weights spread the logits: choices are then far from ties.
        with torch.no_grad():
            if model.lm_head is not None:
                model.lm_head.weight.mul_(20)
        return model.eval()

    return make


@pytest.fixture
def make_engine() -> MakeEngine:
    def make(
        model: Decoder,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        draft: Decoder | None = None,
        heads: DraftHeads | None = None,
        **changes: object,
    ) -> Engine:
        settings: dict[str, object] = {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "context_length": model.config.context_length,
            "block_size": block_size,
            "max_num_seqs": 8,
            "max_batched_tokens": 16,
        }
        config = EngineConfig.model_validate(settings | changes)
        shape = None if draft is None else draft.config
        size = kv_bytes_per_token(config, model.config, shape) * block_size * num_blocks
        config = config.replace(kv_cache_bytes=size)
        return Engine(model, ByteVocabulary(), config, draft=draft, heads=heads)

    return make


class Answer:
    """All deltas of one sequence, put together."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def finish_reason(self) -> str | None:
        reasons = [delta.finish_reason for delta in self.deltas]
        assert all(reason is None for reason in reasons[:-1]), "finish reason before the end"
        return reasons[-1]


Run = Callable[..., dict[tuple[str, int], Answer]]


@pytest.fixture
def run() -> Run:
    """Add requests, step until idle, and collect the answers by (request id, index)."""

    def go(engine: Engine, *requests: Request) -> dict[tuple[str, int], Answer]:
        answers: dict[tuple[str, int], Answer] = {}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            deltas = engine.step()
            keys = [(delta.request_id, delta.index) for delta in deltas]
            assert len(set(keys)) == len(keys), "two deltas for a sequence in one step"
            for key, delta in zip(keys, deltas, strict=True):
                answers.setdefault(key, Answer()).deltas.append(delta)
        assert all(answer.finish_reason is not None for answer in answers.values())
        assert engine.stats().kv_blocks_used == 0
        return answers

    return go


Logits = Callable[[Decoder, Sequence[int]], torch.Tensor]


@pytest.fixture
def full_logits() -> Logits:
    """The (T, V) logits of a full forward pass, without any cache."""

    @torch.inference_mode()
    def compute(model: Decoder, tokens: Sequence[int]) -> torch.Tensor:
        attention = CausalAttention(sliding_window=model.config.sliding_window)
        positions = torch.arange(len(tokens))[None]
        return model.logits(model(torch.tensor([list(tokens)]), positions, attention))[0]

    return compute
