"""minigpt's models as lm-eval sees them. Imported only where tasks are run.

Prompts begin as the model's documents do, with its begin-of-text token where the tokenizer adds
one. See https://github.com/EleutherAI/lm-evaluation-harness, `docs/model_guide.md`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows

from minigpt.core.telemetry import progress
from minigpt.data.tokenizer import Tokenizer
from minigpt.evaluate.generate import generate
from minigpt.evaluate.likelihood import Span, SpanScore, score_spans
from minigpt.model.decoder import Decoder

_DEFAULT_MAX_TOKENS = 256
"""lm-eval's own default for `max_gen_toks`."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A decoder and its tokenizer behind lm-eval's interface."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        batch_tokens: int,
        seed: int,
    ) -> None:
        super().__init__()
        self._model = model
        self._text = tokenizer
        self._context_length = context_length
        self._batch_tokens = batch_tokens
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        """The token that conditions a text without context."""
        for token in (self._text.bos_token_id, self._text.eos_token_id):
            if token is not None:
                return token
        return 0

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, begun as a document unless `add_special_tokens` is False."""
        return self._text.encode(string, bos=add_special_tokens is not False)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, windowed as lm-eval prescribes."""
        spans, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for context, wanted in get_rolling_token_windows(
                tokens, self.eot_token_id, self._context_length, 1
            ):
                window = np.array([*context, wanted[-1]])
                spans.append(Span(window, len(window) - len(wanted)))
                owners.append(owner)
        totals = np.zeros(len(requests))
        for owner, score in zip(owners, self._scores(spans), strict=True):
            totals[owner] -= score.nll_nats
        return [float(total) for total in totals]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts until one of the texts in `until`, which is cut off."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for arguments, members in alike.items():
            contexts = [requests[index].args[0] for index in members]
            texts = self._continue(contexts, json.loads(arguments))
            for index, text in zip(members, texts, strict=True):
                answers[index] = text
        return answers

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        spans = []
        for _, context, continuation in requests:
            # The end of an over-long text is kept, as lm-eval's own models do.
            tokens = np.array([*context, *continuation])[-(self._context_length + 1) :]
            spans.append(Span(tokens, max(1, len(tokens) - len(continuation))))
        return [(-score.nll_nats, score.greedy) for score in self._scores(spans)]

    def _scores(self, spans: list[Span]) -> list[SpanScore]:
        with progress("scoring tokens", total=sum(len(s.tokens) - 1 for s in spans)) as bar:
            return score_spans(
                self._model, spans, batch_tokens=self._batch_tokens, greedy=True, progress=bar
            )

    def _continue(self, contexts: list[str], arguments: dict[str, Any]) -> list[str]:
        until = arguments.get("until") or []
        until = [until] if isinstance(until, str) else until
        max_tokens = int(arguments.get("max_gen_toks", _DEFAULT_MAX_TOKENS))
        max_tokens = min(max_tokens, self._context_length - 1)
        room = self._context_length - max_tokens
        prompts = [self.tok_encode(context)[-room:] or [self.eot_token_id] for context in contexts]
        temperature = float(arguments.get("temperature", 0.0))
        with progress("answering", total=len(prompts)) as bar:
            completions = generate(
                self._model,
                prompts,
                max_tokens=max_tokens,
                temperature=temperature if arguments.get("do_sample", temperature > 0) else 0.0,
                seed=self._seed,
                stop=lambda tokens: any(end in self._text.decode(tokens) for end in until),
                progress=bar,
            )
        return [_cut(self._text.decode(each.tokens), until) for each in completions]


def _cut(text: str, until: list[str]) -> str:
    """Return the text before the first of the ends it contains."""
    return text[: min((text.find(end) for end in until if end in text), default=len(text))]
