"""In-loop validation: bits per byte on what is held out, and a sample to read.

Of texts every token counts, of conversations what the assistant says, of preferences the chosen
answers, besides how often and how far they are preferred. Nothing here touches the global random
generators or the compiled step, so that a run with validation has the same losses, bit for bit,
as one without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from minigpt.data.chat_template import ChatTemplate
from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.training_data import Documents
from minigpt.evaluate.likelihood import (
    DocumentScore,
    Span,
    autocast,
    bits_per_byte,
    score_documents,
    score_spans,
)
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder
from minigpt.train.config import ValidationConfig
from minigpt.train.objective import Objective
from minigpt.train.preference import PreferenceObjective, pair_margins, preference_losses

_SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class ValidationResult:
    """How well the model predicts what is held out."""

    bits_per_byte: float
    """Of texts, of the assistant's words, or of the chosen answers."""
    loss: float
    """Nats per target, or per pair."""
    tokens: int
    """Targets."""
    bytes: int
    """That the targets stand for."""


@dataclass(frozen=True)
class PreferenceResult(ValidationResult):
    """How well the model tells held-out chosen answers from rejected ones."""

    accuracy: float
    """Share of pairs with a positive margin."""
    margin: float
    """Mean margin of the implicit reward, nats."""


class Validator:
    """Scores one fixed choice of validation documents, whatever the step.

    Args:
        dataset: The held-out split.
        tokenizer: The dataset's.
        config: How much to score, what to sample.
        context_length: Tokens that the model sees at most.
        dtype: Of matrix products.
        seed: Chooses the documents and the samples.
        objective: The run's; needed for preferences.
    """

    def __init__(
        self,
        dataset: Documents,
        tokenizer: Tokenizer,
        config: ValidationConfig,
        *,
        context_length: int,
        dtype: str,
        seed: int,
        objective: Objective | None = None,
    ) -> None:
        self._content = dataset.content
        if self._content == "text":
            self._documents = choose_documents(dataset, config.tokens, seed)
        else:
            assert isinstance(dataset, TokenDataset)  # only texts come from several
            examples = choose_examples(dataset, config.tokens, seed)
            self._documents = [np.asarray(dataset.document(i)) for i in examples]
            self._spans = [answer_spans(dataset, i) for i in examples]
        self._objective = objective
        self._reference_nll: list[float] = []
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
        with _evaluating(model):
            if self._content == "text":
                return _summary(
                    score_documents(
                        model,
                        self._documents,
                        self._byte_lengths,
                        context_length=self._context_length,
                        autocast_dtype=self._dtype,
                    )
                )
            scores = self._score_answers(model)
            return (
                self._prefer(model, scores) if self._content == "preference" else _summary(scores)
            )

    def _score_answers(self, model: Decoder) -> list[DocumentScore]:
        """Score each example's answers, given all that precedes them."""
        flat = [span for spans in self._spans for span in spans]
        found = iter(score_spans(model, flat, autocast_dtype=self._dtype))
        scores = []
        for spans in self._spans:
            targets = [span.tokens[span.first_target :] for span in spans]
            scores.append(
                DocumentScore(
                    math.fsum(next(found).nll_nats for _ in spans),
                    sum(map(len, targets)),
                    sum(int(self._byte_lengths[part].sum()) for part in targets),
                )
            )
        return scores

    def _prefer(self, model: Decoder, scores: list[DocumentScore]) -> PreferenceResult:
        """Judge pairs of scores, chosen and rejected in turn, against the reference's."""
        objective = self._objective
        assert isinstance(objective, PreferenceObjective)
        if not self._reference_nll:  # the same at every step
            with objective.reference.beside(model) as reference:
                self._reference_nll = [s.nll_nats for s in self._score_answers(reference)]
        policy = torch.tensor([score.nll_nats for score in scores], dtype=torch.float64)
        frozen = torch.tensor(self._reference_nll, dtype=torch.float64)
        margins = pair_margins(frozen - policy, objective.beta)
        chosen = _summary(scores[::2])
        return PreferenceResult(
            bits_per_byte=chosen.bits_per_byte,
            loss=float(preference_losses(margins, objective.label_smoothing).mean()),
            tokens=chosen.tokens,
            bytes=chosen.bytes,
            accuracy=float((margins > 0).double().mean()),
            margin=float(margins.mean()),
        )

    @torch.no_grad()
    def sample(self, model: Decoder, step: int) -> str:
        """Continue the configured prompt by a few tokens; the same for the same weights."""
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        tokens = self._prompt()
        start, eos = len(tokens), self._tokenizer.eos_token_id
        attention = CausalAttention(sliding_window=model.config.sliding_window)
        for _ in range(self._config.sample_tokens):
            window = torch.tensor([tokens[-self._context_length :]], device=device)
            positions = torch.arange(window.shape[1], device=device)[None]
            with autocast(device, self._dtype), _evaluating(model):
                logits = model.logits(model(window, positions, attention)[:, -1])
            logits = logits[0, : self._tokenizer.vocab_size].float().cpu()
            weights = torch.softmax(logits / _SAMPLE_TEMPERATURE, dim=-1)
            tokens.append(int(torch.multinomial(weights, 1, generator=generator)))
            if tokens[-1] == eos:
                break
        return self._config.sample_prompt + self._tokenizer.decode(
            [token for token in tokens[start:] if token != eos]
        )

    def _prompt(self) -> list[int]:
        """Return the sample's beginning: a text's, or the assistant's turn after a user's."""
        prompt = self._config.sample_prompt
        if prompt and self._content != "text":
            return ChatTemplate(self._tokenizer).encode([{"role": "user", "content": prompt}])
        return self._tokenizer.encode(prompt, bos=True) or [0]


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


def choose_examples(dataset: TokenDataset, most_tokens: int, seed: int) -> list[int]:
    """Draw whole examples, pairs together, until the next would go beyond `most_tokens`.

    Returns:
        Documents; of preferences the chosen and the rejected in turn.
    """
    group = 2 if dataset.index.content == "preference" else 1
    order = np.random.default_rng(seed).permutation(dataset.num_documents // group)
    chosen: list[int] = []
    left = most_tokens
    for unit in order.tolist():
        members = range(group * unit, group * unit + group)
        left -= int(dataset.offsets[members[-1] + 1] - dataset.offsets[members[0]])
        if left < 0:
            break
        chosen += members
    return chosen


def answer_spans(dataset: TokenDataset, document: int) -> list[Span]:
    """Return a span for each run of targets in a document, from the document's beginning."""
    begin, end = dataset.offsets[document], dataset.offsets[document + 1]
    mask = dataset.target_mask(int(begin), int(end))
    assert mask is not None and not mask[0]
    edges = np.flatnonzero(np.diff(np.append(mask, False).astype(np.int8))) + 1
    tokens = np.asarray(dataset.document(document))
    return [Span(tokens[:last], int(first)) for first, last in edges.reshape(-1, 2).tolist()]


def _summary(scores: list[DocumentScore]) -> ValidationResult:
    tokens = sum(score.tokens for score in scores)
    return ValidationResult(
        bits_per_byte=bits_per_byte(scores),
        loss=math.fsum(score.nll_nats for score in scores) / max(1, tokens),
        tokens=tokens,
        bytes=sum(score.bytes for score in scores),
    )


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """Switch dropout off within the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
