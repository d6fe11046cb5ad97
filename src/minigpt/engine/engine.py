"""The engine: requests in, deltas out, one step at a time."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from minigpt.api.requests import Delta, EngineStats, Ready, Request
from minigpt.core.clock import Clock, SystemClock
from minigpt.core.errors import RequestError
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine import loading
from minigpt.engine.blocks import BlockManager
from minigpt.engine.config import EngineConfig
from minigpt.engine.cost_model import Pacer, largest_step
from minigpt.engine.draft_heads import HeadDrafter
from minigpt.engine.draft_model import DraftModel
from minigpt.engine.execution import Drafter, Executor, Outcome
from minigpt.engine.fairness import FairQueue
from minigpt.engine.host import environment
from minigpt.engine.native import make_runner
from minigpt.engine.output import OutputProcessor, Vocabulary
from minigpt.engine.parallel import Ranks
from minigpt.engine.parallel_runner import ParallelRunner
from minigpt.engine.prefix_cache import prefix_root
from minigpt.engine.prompt import Observer
from minigpt.engine.resolve import activation_bits, kv_bytes_per_token, kv_cache_dtype
from minigpt.engine.scheduler import Scheduler
from minigpt.engine.sequence import Sequence
from minigpt.engine.shaping import Shaping
from minigpt.engine.speculative import Speculator
from minigpt.engine.structured import GrammarCompiler
from minigpt.engine.swap import Exchange, Host
from minigpt.engine.utilization import UtilizationMeter, WorkSize
from minigpt.engine.validate import check_request
from minigpt.engine.warmup import bytes_read, measure_limits, warm_up
from minigpt.engine.weights import HeldWeights
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import DraftHeads


class Engine:
    """Continuous batching over one model. Not thread-safe: one loop owns it.

    Use:
        engine = Engine.load("runs/model", EngineConfig())
        engine.add(request)
        while engine.has_work:
            for delta in engine.step(): ...

    Args:
        model: In eval mode, on its device, in the config's dtype (integer weights stay so). The
            engine takes its weights: it is not to be used beside it.
        vocabulary: Turns tokens into bytes.
        config: With every "auto" settled; see `resolve`.
        draft: The model that drafts, likewise; only with the method "draft".
        ranks: The other processes that compute the model, of which `model` is then rank 0's part.
        heads: The model's draft heads, likewise; only with the method "heads".
        model_id: Hash of what is served.
        clock: For durations in the stats.
    """

    def __init__(
        self,
        model: Decoder,
        vocabulary: Vocabulary,
        config: EngineConfig,
        *,
        draft: Decoder | None = None,
        ranks: Ranks | None = None,
        heads: DraftHeads | None = None,
        model_id: str = "",
        clock: Clock | None = None,
    ) -> None:
        assert config.max_batched_tokens != "auto"
        assert config.kv_cache_bytes != "auto"
        assert config.context_length != "auto"
        self.config = config
        self.vocabulary = vocabulary
        self._context_length = config.context_length
        self._model_config = model.config if ranks is None else ranks.model
        self._ranks = ranks
        self._clock = clock or SystemClock()
        assert (draft is None) == (config.speculative.method != "draft")
        assert (heads is None) == (config.speculative.method != "heads")
        draft_config = None if draft is None else draft.config
        per_token = kv_bytes_per_token(config, self._model_config, draft_config)
        num_blocks = config.kv_cache_bytes // (per_token * config.block_size)
        blocks = BlockManager(num_blocks, config.block_size)
        target = config.inter_token_target_ms
        self._pacer = Pacer(None if target == "auto" else target / 1000)
        cache: dict[str, Any] = {
            "num_blocks": num_blocks,
            "block_size": config.block_size,
            "dtype": getattr(torch, config.dtype),
        }
        self._work_size = WorkSize.of(self._model_config, bytes_read(model), per_token)
        self._meter: UtilizationMeter | None = None
        drafter: Drafter | None = None
        if ranks is not None:
            assert heads is None, "see SpeculativeConfig"
            self._weights = HeldWeights(model_id, ParallelRunner.with_cache(model, ranks, **cache))
        else:
            runner = make_runner(
                model,
                **cache,
                cache_format=kv_cache_dtype(config),
                adapters=config.adapters,
                activation_bits=activation_bits(config),
            )
            self._weights = HeldWeights(model_id, runner)
            drafter = None if heads is None else HeadDrafter(heads, runner)
        if draft is not None:
            drafter = DraftModel(draft, **cache, cache_format=kv_cache_dtype(config))
        self._exchange = Exchange(self._weights, self._host, self.ready)
        self._speculator: Speculator | None = None
        if config.speculative.method != "none":
            can_draft = None if drafter is None else drafter.can_draft
            self._speculator = Speculator(config.speculative, self._pacer.model, can_draft)
        self._scheduler = Scheduler(
            blocks,
            config.max_num_seqs,
            config.max_batched_tokens,
            queue=FairQueue.of(config),
            pacer=self._pacer,
            speculator=self._speculator,
            prefix_cache=config.prefix_cache,
            priority_step_tokens=config.priority_step_tokens,
        )
        self._executor = Executor(self._weights, self._scheduler, self._speculator, drafter)
        ends = self._model_config.stop_token_ids
        eos = (self._model_config.eos_token_id, vocabulary.eos_token_id, *ends)
        self._eos_token_ids = tuple(dict.fromkeys(t for t in eos if t is not None))
        self._output = OutputProcessor(vocabulary, self._eos_token_ids)
        self._grammars = GrammarCompiler(vocabulary, self._eos_token_ids)
        self._held: dict[str, Future[Any]] = {}
        """Requests that are not scheduled yet: their grammars are being compiled."""
        self._requests: dict[str, list[Sequence]] = {}
        """The unfinished sequences of each request."""
        self._pending: list[Delta] = []
        self._largest_step = largest_step(
            config.max_batched_tokens, config.max_num_seqs, config.context_length
        )
        self._arrivals = itertools.count()
        self._seeds = random.Random(config.seed)
        self._steps = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._last_step = (0.0, 0, 0)
        self._load_seconds = 0.0

    @classmethod
    def load(
        cls, path: str | Path, config: EngineConfig | None = None, *, clock: Clock | None = None
    ) -> Engine:
        """Load a model artifact or a Hugging Face directory, ready to step.

        Each derived number is logged with its derivation.

        Args:
            path: With weights, `config.json` and a tokenizer.
            config: "auto" values are settled here.
            clock: For durations.

        Raises:
            ModelError: No usable weights there, they do not fit in memory, or the tokenizer
                does not fit the model.
            ConfigError: The KV cache can't hold one context, no such device is there, or the
                model can't be cut among `tensor_parallel_size` processes.
            RankError: One of those processes ended.
        """
        from minigpt.core.telemetry import get_logger

        clock = clock or SystemClock()
        started = clock.monotonic()
        loaded = loading.load(path, config or EngineConfig(), get_logger("engine").info)
        engine = cls(
            loaded.model,
            loaded.tokenizer,
            loaded.config,
            draft=loaded.draft,
            ranks=loaded.ranks,
            heads=loaded.heads,
            model_id=loaded.id,
            clock=clock,
        )
        engine.warm_up()
        engine._load_seconds = clock.monotonic() - started
        return engine

    def warm_up(self) -> None:
        """Learn what steps take and what the machine can do; only before the first request."""
        run, weights = self._weights.run, self._weights.current
        warm_up(run, self._pacer.model, self.config, weights, self._clock)
        if self._model_config.num_experts or self.config.tensor_parallel_size > 1:
            return
        if (limits := measure_limits(self.config)) is not None:
            self._meter = UtilizationMeter(self._work_size, limits)

    @property
    def runner_name(self) -> str:
        """What multiplies: `kernels` or `torch`."""
        return self._weights.runner.name

    @property
    def activation_bits(self) -> int | None:
        """To what the inputs of integer weights are rounded; None where nothing is."""
        return self._weights.runner.activation_bits

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do, to hand over or to raise."""
        waits = bool(self._held) or self._exchange.under_way
        lost = self._ranks is not None and self._ranks.lost
        return self._scheduler.has_work or bool(self._pending) or waits or lost

    def check(self, request: Request) -> None:
        """Refuse what can't be served, now or ever; changes nothing and is thread-safe.

        Raises:
            RequestError: A bad parameter, a token outside the vocabulary, too long, or an
                adapter that is not loaded.
        """
        check_request(
            request,
            vocab_size=self._model_config.vocab_size,
            context_length=self._context_length,
            max_logprobs=self.config.max_logprobs,
        )
        self._weights.adapter(request.adapter)
        tokens = len(request.prompt_token_ids) + max(request.sampling.max_tokens, 1) - 1
        self._scheduler.check_fits(tokens)

    def add(self, request: Request, *, observe: Observer | None = None) -> None:
        """Queue a request.

        Args:
            request: It.
            observe: Sees the prompt's logits, where the request asks for `prompt_logprobs`.

        Raises:
            RequestError: As `check`, or its id is in use. Nothing was queued.
        """
        self.check(request)
        if request.id in self._requests:
            raise RequestError(f"request id {request.id!r} is in use", remedy="choose another")
        sampling = request.sampling
        seed = self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed
        weights, adapter = self._weights.current, self._weights.adapter(request.adapter)
        root = prefix_root(weights, adapter)
        sequences = [
            Sequence.from_request(
                request, index, next(self._arrivals), seed, root, weights=weights, adapter=adapter
            )
            for index in range(request.n)
        ]
        self._requests[request.id] = sequences
        now = self._clock.monotonic()
        for sequence in sequences:
            sequence.arrived_seconds = now
            if sequence.reader is not None:
                sequence.reader.observe = observe
            sequence.shaping = Shaping.of(sampling, request.prompt_token_ids, self._eos_token_ids)
            if sampling.structured is None:
                self._scheduler.add(sequence)
        if sampling.structured is not None:
            self._held[request.id] = self._grammars.compile(sampling.structured)

    def abort(self, request_id: str) -> None:
        """Drop a request at once; unknown and finished ones are ignored.

        The next `step` reports its unfinished sequences with finish reason "abort".
        """
        held = self._held.pop(request_id, None) is not None
        for sequence in tuple(self._requests.get(request_id, ())):
            self._finish(sequence, scheduled=not held)
            self._pending.append(self._output.close(sequence, "abort"))

    def step(self) -> list[Delta]:
        """Compute one batch.

        Never raises for a request: one that fails finishes with reason "error", the others
        go on.

        Returns:
            What each sequence gained, at most one delta a sequence; with nothing to do, none.

        Raises:
            RankError: A process of a tensor parallel engine is gone or silent: all is lost.
        """
        if self._ranks is not None:
            self._ranks.check()
        started = self._clock.monotonic()
        self._release_compiled()
        if self._exchange.under_way and self._exchange.install(
            may_wait=not (self._scheduler.has_work or self._pending)
        ):
            self._release_weights()
        deltas, self._pending = self._pending, []
        batch = self._scheduler.schedule()
        if not batch.chunks:
            return deltas
        for chunk in batch.chunks:
            if chunk.sequence.queue_seconds is None:
                chunk.sequence.queue_seconds = started - chunk.sequence.arrived_seconds
        self._executor.copy_blocks(batch.copies)
        for outcome in self._executor.run(batch.chunks):
            deltas.append(self._take_over(outcome))
        self._steps += 1
        seconds = self._clock.monotonic() - started
        work = batch.work
        self._pacer.model.observe(work, seconds)
        if self._meter is not None:
            self._meter.observe(work, seconds)
        decode = batch.num_decode_tokens
        self._last_step = (seconds, batch.num_tokens - decode, decode)
        if not self._scheduler.has_work:
            self._scheduler.check()
        return deltas

    def swap(self, path: str | Path) -> Future[Ready]:
        """Serve other weights; see `Exchange.swap`."""
        return self._exchange.swap(path)

    def load_adapter(self, name: str, path: str | Path) -> Ready:
        """Let requests name a LoRA adapter of the served weights; see `Exchange.load_adapter`."""
        self._exchange.load_adapter(name, path)
        return self.ready()

    def unload_adapter(self, name: str) -> Ready:
        """Drop an adapter; sequences that run with it finish with it.

        Raises:
            RequestError: Status 404, there is none of this name.
        """
        self._weights.unload_adapter(name)
        self._release_weights()
        return self.ready()

    def stats(self) -> EngineStats:
        """Return the counters and gauges as they are between two steps."""
        seconds, prefill_tokens, decode_tokens = self._last_step
        blocks = self._scheduler.blocks
        return EngineStats(
            step=self._steps,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.queue),
            kv_blocks_used=blocks.num_used,
            kv_blocks_total=blocks.num_blocks,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=self._scheduler.num_preemptions,
            last_step_seconds=seconds,
            last_step_prefill_tokens=prefill_tokens,
            last_step_decode_tokens=decode_tokens,
            prefix_cache_queries=self._scheduler.num_prefix_queries,
            prefix_cache_hits=self._scheduler.num_prefix_hits,
            drafted_tokens=0 if self._speculator is None else self._speculator.num_drafted,
            accepted_tokens=0 if self._speculator is None else self._speculator.num_accepted,
            largest_step_seconds=self._pacer.model.predict(self._largest_step),
            utilization=[] if self._meter is None else self._meter.read(),
        )

    def ready(self) -> Ready:
        """Return what clients of the engine need to know of the model."""
        blocks = self._scheduler.blocks
        return Ready(
            model_id=self._weights.current,
            vocab_size=self._model_config.vocab_size,
            context_length=self._context_length,
            kv_blocks_total=blocks.num_blocks,
            block_size=blocks.block_size,
            eos_token_id=self._eos_token_ids[0] if self._eos_token_ids else None,
            load_seconds=self._load_seconds,
            adapters=dict(self._weights.adapters),
            engine_config=self.config.model_dump_json(),
            environment=environment() | {"runner": self.runner_name},
        )

    def close(self) -> None:
        """End the other processes of a tensor parallel engine; it steps no more."""
        if self._ranks is not None:
            self._ranks.close()

    def _take_over(self, outcome: Outcome) -> Delta:
        sequence = outcome.sequence
        if outcome.error:
            self._executor.clear(sequence)
            self._finish(sequence)
            return self._output.close(sequence, "error", outcome.error)
        if sequence.sampling.max_tokens:
            delta = self._output.extend(sequence, outcome.choices)
            self._generation_tokens += len(delta.token_ids)
        else:
            delta = self._output.answer_prompt(sequence)
        if sequence.index == 0 and sequence.num_output_tokens <= 1:
            self._prompt_tokens += sequence.num_prompt_tokens
        if delta.finish_reason is not None:
            self._finish(sequence)
        return delta

    def _release_compiled(self) -> None:
        """Schedule the requests whose grammars are compiled; with nothing else to do, wait."""
        for request_id, compiled in tuple(self._held.items()):
            if not compiled.done() and (self._scheduler.has_work or self._pending):
                continue
            error = compiled.exception()
            del self._held[request_id]
            for sequence in tuple(self._requests[request_id]):
                if error is not None:
                    self._finish(sequence, scheduled=False)
                    self._pending.append(self._output.close(sequence, "error", str(error)))
                    continue
                assert sequence.shaping is not None
                sequence.shaping.grammar = self._grammars.state(compiled.result())
                sequence.arrival = next(self._arrivals)
                self._scheduler.add(sequence)

    def _finish(self, sequence: Sequence, *, scheduled: bool = True) -> None:
        if scheduled:
            self._scheduler.finish(sequence)
        siblings = self._requests[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request_id]
            self._release_weights()

    def _release_weights(self) -> None:
        """Free the weights and adapters that nothing needs any more."""
        self._weights.release(s for sequences in self._requests.values() for s in sequences)

    def _host(self) -> Host:
        assert isinstance(self.vocabulary, Tokenizer), "weights come with a tokenizer"
        blocks = self._scheduler.blocks
        return Host.of(self.config, self._model_config, self.vocabulary, blocks)
