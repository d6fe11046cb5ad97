"""What the server does, whatever face it is asked through: validated bodies to generations."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from minigpt.api.openai import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)
from minigpt.api.openai_responses import Model
from minigpt.api.requests import Ready, Request, SamplingParams
from minigpt.core.errors import RequestError
from minigpt.data.chat_template import ChatTemplate
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.validate import check_request
from minigpt.serve.engine_client import EngineClient, Generation

_DEFAULT_COMPLETION_TOKENS = 16
_MAX_CHOICES_PER_CALL = 1024
_INLINE_CHARACTERS = 20_000

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """An accepted call: its identity, its prompts and its answers as they come."""

    id: str
    created: int
    model: str
    fingerprint: str
    """Changes with the weights, as OpenAI's system_fingerprint."""
    generation: Generation
    echo: tuple[str, ...] = ()
    """Text to put before each choice, where the client asked for it."""


class Service:
    """Serves one model: checks, tokenizes, submits.

    Args:
        model_name: The name that clients ask for.
        tokenizer: The model's.
        chat_template: The model's.
        client: The engine.
    """

    def __init__(
        self,
        model_name: str,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        client: EngineClient,
    ) -> None:
        self.model_name = model_name
        self.tokenizer = tokenizer
        self.created = int(time.time())
        self.draining = False
        self._chat_template = chat_template
        self._client = client

    def model(self) -> Model:
        """Describe the served model."""
        ready = self._client.ready
        return Model(
            id=self.model_name,
            created=self.created,
            root=ready.model_id if ready else "",
            max_model_len=ready.context_length if ready else None,
        )

    def check_model(self, name: str) -> None:
        """Refuse any name but the served one.

        Raises:
            RequestError: Status 404.
        """
        if name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist here",
                param="model",
                status=404,
                code="model_not_found",
                remedy=f"ask for {self.model_name!r}",
            )

    async def complete(self, body: CompletionBody) -> Job:
        """Start the answers to `/v1/completions`.

        Raises:
            RequestError: 4xx, or 503 while there is no engine.
        """
        ready = self._admit(body)
        prompts = body.prompt
        if len(prompts) * body.choices > _MAX_CHOICES_PER_CALL:
            raise RequestError(
                f"{len(prompts)} prompts times n = {body.choices} are more than "
                f"{_MAX_CHOICES_PER_CALL} answers",
                param="prompt",
                remedy="send several requests",
            )
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        tokens = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if texts:
            tokens = await _off_loop(
                lambda: [self.tokenizer.encode(text, bos=True) for text in texts],
                sum(map(len, texts)),
            )
            tokens = [prompt or self._empty_prompt() for prompt in tokens]
        echo: tuple[str, ...] = ()
        limit = body.max_tokens
        samplings = [
            body.sampling(limit or min(_DEFAULT_COMPLETION_TOKENS, _room(ready, prompt)))
            for prompt in tokens
        ]
        self._check(ready, body, tokens, samplings)
        if body.echo:
            echo = tuple(texts) if texts else tuple(self.tokenizer.decode(t) for t in tokens)
        return self._submit("cmpl", ready, body, tokens, samplings, echo)

    async def chat(self, body: ChatCompletionBody) -> Job:
        """Start the answers to `/v1/chat/completions`.

        Raises:
            RequestError: As `complete`.
        """
        ready = self._admit(body)
        # Templates know "system"; "developer" is OpenAI's newer name for it.
        messages = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text}
            for m in body.messages
        ]
        prompt = await _off_loop(
            lambda: self._chat_template.encode(messages), sum(len(m["content"]) for m in messages)
        )
        sampling = body.sampling(body.token_limit or _room(ready, prompt))
        self._check(ready, body, [prompt], [sampling])
        return self._submit("chatcmpl", ready, body, [prompt], [sampling])

    async def tokenize(self, body: TokenizeBody) -> list[int]:
        """Return the tokens of a text.

        Raises:
            RequestError: Status 404, another model was named.
        """
        self.check_model(body.model or self.model_name)
        return await _off_loop(
            lambda: self.tokenizer.encode(body.prompt, bos=body.add_special_tokens),
            len(body.prompt),
        )

    def detokenize(self, body: DetokenizeBody) -> str:
        """Return the text of tokens.

        Raises:
            RequestError: Status 404, another model was named; 400, no such token.
        """
        self.check_model(body.model or self.model_name)
        if (highest := max(body.tokens, default=0)) >= self.tokenizer.vocab_size:
            raise RequestError(
                f"tokens: id {highest} is outside the vocabulary of {self.tokenizer.vocab_size}",
                param="tokens",
            )
        return self.tokenizer.decode(body.tokens)

    def _admit(self, body: GenerationBody) -> Ready:
        self.check_model(body.model)
        if self.draining:
            raise RequestError("the server is shutting down", status=503, code="draining")
        if self._client.ready is None:
            raise RequestError(
                "the engine is starting", status=503, code="engine_not_ready", remedy="try again"
            )
        return self._client.ready

    def _check(
        self,
        ready: Ready,
        body: GenerationBody,
        prompts: list[list[int]],
        samplings: list[SamplingParams],
    ) -> None:
        """Refuse here what the engine would refuse, before any of the prompts is queued."""
        for prompt, sampling in zip(prompts, samplings, strict=True):
            check_request(
                Request(id="", prompt_token_ids=prompt, sampling=sampling, n=body.choices),
                vocab_size=ready.vocab_size,
                context_length=_context(ready),
                max_logprobs=sampling.logprobs or 0,
            )

    def _submit(
        self,
        prefix: str,
        ready: Ready,
        body: GenerationBody,
        prompts: list[list[int]],
        samplings: list[SamplingParams],
        echo: tuple[str, ...] = (),
    ) -> Job:
        job_id = f"{prefix}-{uuid.uuid4().hex}"
        requests = [
            Request(
                id=f"{job_id}-{number}", prompt_token_ids=prompt, sampling=sampling, n=body.choices
            )
            for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]
        return Job(
            id=job_id,
            created=int(time.time()),
            model=self.model_name,
            fingerprint=f"fp_{ready.model_id[:10]}",
            generation=self._client.submit(requests),
            echo=echo,
        )

    def _empty_prompt(self) -> list[int]:
        """Stand in for an empty text: the end-of-text token, which begins every document."""
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]


def _context(ready: Ready) -> int:
    """Most tokens of a sequence: the model's limit, or the KV cache's where that is less."""
    return min(ready.context_length, ready.kv_blocks_total * ready.block_size)


def _room(ready: Ready, prompt: list[int]) -> int:
    """Return what the context leaves for an answer, at least 1 so that the check can refuse."""
    return max(1, _context(ready) - len(prompt))


async def _off_loop(work: Callable[[], T], characters: int) -> T:
    """Run tokenization; long texts in a thread, so that they hold up no stream."""
    if characters <= _INLINE_CHARACTERS:
        return work()
    return await asyncio.to_thread(work)
