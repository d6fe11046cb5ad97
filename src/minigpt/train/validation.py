"""In-loop validation: bits per byte on held-out documents, and a sample to read.

Neither touches the global random generators nor the compiled step, so that a run with
validation has the same losses, bit for bit, as one without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.data.training_data import Documents
from minigpt.evaluate.likelihood import autocast, bits_per_byte, score_documents
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder
from minigpt.train.config import ValidationConfig

_SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class ValidationResult:
    """How well the model predicts the held-out documents."""

    bits_per_byte: float
    loss: float
    """Nats per token."""
    tokens: int
    bytes: int


class Validator:
    """Scores one fixed choice of validation documents, whatever the step."""

    def __init__(
        self,
        dataset: Documents,
        tokenizer: Tokenizer,
        config: ValidationConfig,
        *,
        context_length: int,
        dtype: str,
        seed: int,
    ) -> None:
        self._documents = choose_documents(dataset, config.tokens, seed)
        self._tokenizer = tokenizer
        self._byte_lengths = tokenizer.byte_lengths()
        self._config = config
        self._context_length = context_length
        self._dtype = dtype
        self._seed = seed

    @property
    def num_tokens(self) -> int:
        """Tokens that one validation runs through the model."""
        return sum(len(document) for document in self._documents)

    def score(self, model: Decoder) -> ValidationResult | None:
        """Score the documents; None where the dataset holds none for validation."""
        if not self._documents:
            return None
        scores = score_documents(
            model,
            self._documents,
            self._byte_lengths,
            context_length=self._context_length,
            autocast_dtype=self._dtype,
        )
        tokens = sum(score.tokens for score in scores)
        return ValidationResult(
            bits_per_byte=bits_per_byte(scores),
            loss=math.fsum(score.nll_nats for score in scores) / max(1, tokens),
            tokens=tokens,
            bytes=sum(score.bytes for score in scores),
        )

    @torch.no_grad()
    def sample(self, model: Decoder, step: int) -> str:
        """Continue the configured prompt by a few tokens; the same for the same weights."""
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        tokens = self._tokenizer.encode(self._config.sample_prompt, bos=True) or [0]
        start, eos = len(tokens), self._tokenizer.eos_token_id
        attention = CausalAttention(sliding_window=model.config.sliding_window)
        for _ in range(self._config.sample_tokens):
            window = torch.tensor([tokens[-self._context_length :]], device=device)
            positions = torch.arange(window.shape[1], device=device)[None]
            with autocast(device, self._dtype):
                logits = model.logits(model(window, positions, attention)[:, -1])
            logits = logits[0, : self._tokenizer.vocab_size].float().cpu()
            weights = torch.softmax(logits / _SAMPLE_TEMPERATURE, dim=-1)
            tokens.append(int(torch.multinomial(weights, 1, generator=generator)))
            if tokens[-1] == eos:
                break
        return self._config.sample_prompt + self._tokenizer.decode(
            [token for token in tokens[start:] if token != eos]
        )


def choose_documents(dataset: Documents, most_tokens: int, seed: int) -> list[np.ndarray]:
    """Draw whole documents in an order that `seed` decides, until `most_tokens` are reached.

    The document that would go beyond is cut; one of less than two tokens is passed over.
    """
    order = np.random.default_rng(seed).permutation(dataset.num_documents)
    chosen: list[np.ndarray] = []
    left = most_tokens
    for index in order:
        document = np.asarray(dataset.document(int(index)))[:left]
        if len(document) >= 2:
            chosen.append(document)
            left -= len(document)
        if left < 2:
            break
    return chosen
