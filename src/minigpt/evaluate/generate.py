"""A small batched decoder loop for evaluations: all sequences together, one static cache.

The serving engine is the fast one; this one is simple, needs nothing but a model, and gives
each sequence the same tokens whatever it is batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from minigpt.core.telemetry import Progress
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder

_BATCH = 32
"""Sequences decoded together; bounds the cache."""


@dataclass
class Completion:
    """What a model wrote after one prompt."""

    tokens: list[int] = field(default_factory=list)
    """New tokens, without the one that ended the text."""
    ended: bool = False
    """Whether the model ended the text or `stop` did, and not the limit."""


class RowCacheAttention:
    """Attention over a cache with a row for each sequence, indexed by position.

    Rows may be at different positions: a place beyond a row's position is never visible, and
    is overwritten before it becomes so, which makes right-padded prompts harmless.
    """

    def __init__(self, config: ModelConfig, rows: int, length: int, device: torch.device) -> None:
        self.length = length
        self._shape = (rows, length, config.num_kv_heads, config.head_dim)
        self._window = config.sliding_window
        self._slots = torch.arange(length, device=device)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._positions = torch.empty(0)
        self._mask = torch.empty(0)

    def at(self, positions: Tensor) -> RowCacheAttention:
        """Set the (B, T) positions of the tokens of the next forward pass."""
        distance = positions[:, :, None] - self._slots
        visible = distance >= 0
        if self._window is not None:
            visible &= distance < self._window
        self._positions, self._mask = positions, visible[:, None]  # (B, 1, T, S)
        return self

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values at their positions and attend; see `model.attention`."""
        if layer not in self._keys:
            self._keys[layer] = key.new_zeros(self._shape)
            self._values[layer] = value.new_zeros(self._shape)
        index = self._positions[:, :, None, None].expand_as(key)
        keys = self._keys[layer].scatter_(1, index, key)
        values = self._values[layer].scatter_(1, index, value)
        return functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self._mask,
            enable_gqa=query.shape[2] != key.shape[2],
        ).transpose(1, 2)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Callable[[list[int]], bool] | None = None,
    progress: Progress | None = None,
) -> list[Completion]:
    """Continue prompts until the end-of-text token, a stop or a limit.

    Args:
        model: The decoder; `model.config.eos_token_id` ends a text.
        prompts: Token ids, each at least one and at most the context length.
        max_tokens: Most new tokens; a sequence also ends where the context is full.
        temperature: 0 is greedy.
        seed: Prompt i draws from (seed, i), so that equal calls give equal texts.
        stop: Called with a sequence's new tokens after each; True ends it.
        progress: Told of each finished sequence.
    """
    choice = _Choice(temperature, seed, stop)
    completions: list[Completion] = []
    for start in range(0, len(prompts), _BATCH):
        batch = _Batch(model, prompts[start : start + _BATCH], max_tokens, choice, start)
        completions += batch.run()
        if progress is not None:
            progress.advance(len(batch.completions))
    return completions


class _Choice(NamedTuple):
    """How tokens are chosen and when a sequence stops."""

    temperature: float
    seed: int
    stop: Callable[[list[int]], bool] | None


class _Batch:
    """The sequences that are decoded together."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        choice: _Choice,
        first: int,
    ) -> None:
        limit = model.config.context_length
        assert all(1 <= len(prompt) <= limit for prompt in prompts), [len(p) for p in prompts]
        self.completions = [Completion() for _ in prompts]
        self.device = next(model.parameters()).device
        self._model = model
        self._prompts = prompts
        self._choice = choice
        self._generators = [
            np.random.default_rng((choice.seed, first + row)) for row in range(len(prompts))
        ]
        self._room = [min(max_tokens, limit - len(prompt)) for prompt in prompts]
        length = min(limit, max(map(len, prompts)) + max_tokens)
        self._attention = RowCacheAttention(model.config, len(prompts), length, self.device)

    @torch.no_grad()
    def run(self) -> list[Completion]:
        """Decode until every sequence has ended."""
        last, positions = self._prefill()
        running = [room > 0 for room in self._room]
        while any(running):
            tokens = self._choose(last)
            for row, token in enumerate(tokens.tolist()):
                if running[row]:
                    running[row] = self._append(row, token)
            # A row that has ended goes on unread; its position stays inside the cache.
            positions = (positions + 1).clamp_max(self._attention.length - 1)
            if any(running):
                ids = tokens[:, None].to(self.device)
                last = self._model(ids, positions, self._attention.at(positions))[:, -1]
        return self.completions

    def _prefill(self) -> tuple[Tensor, Tensor]:
        """Run all prompts; return the hidden states (B, C) and positions (B, 1) of their ends."""
        lengths = torch.tensor([len(prompt) for prompt in self._prompts], device=self.device)
        width = int(lengths.max())
        ids = torch.zeros(len(self._prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(self._prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(width, device=self.device).expand_as(ids)
        hidden = self._model(ids.to(self.device), positions, self._attention.at(positions))
        ends = (lengths - 1)[:, None]
        last = hidden.gather(1, ends[:, :, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        return last, ends

    def _choose(self, hidden: Tensor) -> Tensor:
        """Draw the next token of each row, (B,) on the CPU."""
        logits = self._model.logits(hidden).float()
        if self._choice.temperature == 0:
            return logits.argmax(-1).cpu()
        # The inverse of the distribution function at one uniform number a row: unlike
        # torch.multinomial, a row's draw does not depend on the rows beside it.
        cumulative = (logits.double() / self._choice.temperature).softmax(-1).cumsum(-1).cpu()
        uniform = torch.tensor([g.random() for g in self._generators], dtype=torch.float64)
        chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])
        return chosen[:, 0].clamp_max(logits.shape[-1] - 1)

    def _append(self, row: int, token: int) -> bool:
        """Take a row's new token; tell whether the row goes on."""
        completion, stop = self.completions[row], self._choice.stop
        config = self._model.config
        if token in (config.eos_token_id, *config.stop_token_ids):
            completion.ended = True
            return False
        completion.tokens.append(token)
        if stop is not None and stop(completion.tokens):
            completion.ended = True
            return False
        return len(completion.tokens) < self._room[row]
