"""What the server does, whatever face it is asked through: validated bodies to generations."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from minigpt.api.embeddings import EmbeddingBody
from minigpt.api.openai import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from minigpt.api.openai_responses import Model
from minigpt.api.requests import Ready, Request, SamplingParams
from minigpt.core.errors import RequestError
from minigpt.data.chat_template import ChatTemplate
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.structured import check_structured
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
    generation: Generation
    echo: tuple[str, ...] = ()
    """Text to put before each choice, where the client asked for it."""
    prompt_logprobs: int | None = None
    """Alternatives to list in `prompt_logprobs`, where the client asked for that field."""

    @property
    def fingerprint(self) -> str:
        """Changes with the weights and the adapter; as OpenAI's system_fingerprint."""
        return "fp_" + "_".join(part[:10] for part in self.generation.weights.split("+"))


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

    def models(self) -> list[Model]:
        """Describe the served model and its adapters; each one's root is its digest."""
        ready = self._client.ready
        limit = ready.context_length if ready else None
        digest, adapters = (ready.model_id, ready.adapters) if ready else ("", {})
        return [
            Model(self.model_name, self.created, digest, limit),
            *(
                Model(name, self.created, its, limit, self.model_name)
                for name, its in adapters.items()
            ),
        ]

    def check_model(self, name: str) -> None:
        """Refuse any name but the served one's and its adapters'.

        Raises:
            RequestError: Status 404.
        """
        if name != self.model_name and self._adapter(name) is None:
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
        ready = self._admit(body.model)
        prompts = body.prompt
        if len(prompts) * body.choices > _MAX_CHOICES_PER_CALL:
            raise RequestError(
                f"{len(prompts)} prompts times n = {body.choices} are more than "
                f"{_MAX_CHOICES_PER_CALL} answers",
                param="prompt",
                remedy="send several requests",
            )
        tokens = await self._encode(prompts)
        limit = body.max_tokens
        requests = [
            Request(
                id="",
                prompt_token_ids=prompt,
                sampling=body.sampling(
                    min(_DEFAULT_COMPLETION_TOKENS, _room(ready, prompt))
                    if limit is None
                    else limit
                ),
                n=body.choices,
            )
            for prompt in tokens
        ]
        await self._check(ready, requests)
        echo: tuple[str, ...] = ()
        if body.echo:
            echo = tuple(
                prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
                for prompt in prompts
            )
        job = self._submit("cmpl", body.model, requests)
        return replace(job, echo=echo, prompt_logprobs=body.prompt_logprobs)

    async def chat(self, body: ChatCompletionBody) -> Job:
        """Start the answers to `/v1/chat/completions`.

        Raises:
            RequestError: As `complete`.
        """
        ready = self._admit(body.model)
        # Templates know "system"; "developer" is OpenAI's newer name for it.
        messages = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text}
            for m in body.messages
        ]
        prompt = await _off_loop(
            lambda: self._chat_template.encode(messages), sum(len(m["content"]) for m in messages)
        )
        sampling = body.sampling(body.token_limit or _room(ready, prompt))
        requests = [Request(id="", prompt_token_ids=prompt, sampling=sampling, n=body.choices)]
        await self._check(ready, requests)
        job = self._submit("chatcmpl", body.model, requests)
        return replace(job, prompt_logprobs=body.prompt_logprobs)

    async def embed(self, body: EmbeddingBody) -> Job:
        """Start the answers to `/v1/embeddings`.

        Raises:
            RequestError: As `complete`.
        """
        ready = self._admit(body.model)
        if len(body.input) > _MAX_CHOICES_PER_CALL:
            raise RequestError(
                f"{len(body.input)} inputs are more than {_MAX_CHOICES_PER_CALL}",
                param="input",
                remedy="send several requests",
            )
        requests = [
            Request(
                id="",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=0, temperature=0),
                pooling=body.pooling or "mean",
            )
            for prompt in await self._encode(body.input)
        ]
        await self._check(ready, requests)
        return self._submit("embd", body.model, requests)

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

    def _admit(self, model: str) -> Ready:
        self.check_model(model)
        if self.draining:
            raise RequestError("the server is shutting down", status=503, code="draining")
        if self._client.ready is None:
            raise RequestError(
                "the engine is starting", status=503, code="engine_not_ready", remedy="try again"
            )
        return self._client.ready

    async def _encode(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        """Return the tokens of texts as a document would begin; tokens are returned as they are."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if not texts:
            return [prompt for prompt in prompts if not isinstance(prompt, str)]
        encoded = await _off_loop(
            lambda: [self.tokenizer.encode(text, bos=True) for text in texts],
            sum(map(len, texts)),
        )
        return [tokens or self._empty_prompt() for tokens in encoded]

    async def _check(self, ready: Ready, requests: list[Request]) -> None:
        """Refuse here what the engine would refuse, before any of the prompts is queued."""
        for request in requests:
            sampling = request.sampling
            check_request(
                request,
                vocab_size=ready.vocab_size,
                context_length=_context(ready),
                max_logprobs=max(sampling.logprobs or 0, sampling.prompt_logprobs or 0),
            )
        if (structured := requests[0].sampling.structured) is not None:
            await asyncio.to_thread(check_structured, structured)

    def _adapter(self, model: str) -> str | None:
        """Return the adapter that a request's model names; None for the model itself."""
        ready = self._client.ready
        return model if ready is not None and model in ready.adapters else None

    def _submit(self, prefix: str, model: str, requests: list[Request]) -> Job:
        job_id = f"{prefix}-{uuid.uuid4().hex}"
        named = [
            msgspec.structs.replace(request, id=f"{job_id}-{number}", adapter=self._adapter(model))
            for number, request in enumerate(requests)
        ]
        return Job(
            id=job_id,
            created=int(time.time()),
            model=model,
            generation=self._client.submit(named),
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
