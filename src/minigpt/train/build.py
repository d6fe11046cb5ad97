"""The parts of a run, made from its resolved config: model, optimizer, step, data, validator."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from dataclasses import dataclass

import torch

from minigpt.core.artifact import Artifact, is_artifact
from minigpt.core.clock import Clock
from minigpt.core.errors import DataError, TrainingError
from minigpt.core.machine import usable_cores
from minigpt.core.manifest import Parent
from minigpt.core.telemetry import get_logger
from minigpt.data.example_loader import ExampleLoader
from minigpt.data.loader import BatchLoader
from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.lora import add_adapters
from minigpt.model.weights import DTYPES, LoadedModel, check_vocab, load_model
from minigpt.train.allocator import keep_freed_memory
from minigpt.train.config import TrainConfig
from minigpt.train.machine import (
    choose_device,
    has_compiler,
    has_fast_bfloat16,
    measured_peak,
)
from minigpt.train.objectives import (
    check_content,
    check_tokenizer,
    loader_class,
    longest_example,
    make_objective,
)
from minigpt.train.optimizer import Optimizer
from minigpt.train.resolve import Facts, Resolved, resolve, with_steps
from minigpt.train.step import NonFiniteError, StepOptions, TrainStep
from minigpt.train.validation import Validator

_HEAP_BYTES = 4 << 30  # address space, not memory
_MEASURE_SHARE = 0.05
_MEASURE_STEPS = (3, 30)
_RESERVE = 0.03


@dataclass(frozen=True)
class Sources:
    """What a run reads: its dataset, opened, and the weights to start from."""

    dataset: Artifact
    train: TokenDataset
    validation: TokenDataset
    tokenizer: Tokenizer
    initial: LoadedModel | None
    teacher: LoadedModel | None = None

    @property
    def parents(self) -> list[Artifact | Parent]:
        """What the run's checkpoints and its model come from."""
        models = [m for m in (self.initial, self.teacher) if m is not None and is_artifact(m.path)]
        return [self.dataset, *(Parent(id=m.id, kind="model", uri=str(m.path)) for m in models)]

    @property
    def fingerprint(self) -> str:
        """A hash of the dataset's files: equal for a dataset that was prepared again alike."""
        files = {name: entry.sha256 for name, entry in self.dataset.manifest.files.items()}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def open_sources(config: TrainConfig, dataset: Artifact) -> Sources:
    """Open everything the run reads.

    Raises:
        DataError: The training split is empty.
        ConfigError: The dataset's content is not the objective's.
        ModelError: The weights to initialize from, or the teacher, don't fit the tokenizer.
    """
    train = TokenDataset.open(dataset.path, "train")
    if train.num_documents == 0:
        raise DataError(
            f"{dataset.uri} has no training documents", remedy="prepare the dataset from more text"
        )
    check_content(config.objective.kind, train.index.content, dataset.uri)
    tokenizer = Tokenizer.load(train.tokenizer_dir)
    initial, teacher = (
        None if path is None else _load(path, tokenizer)
        for path in (config.initialize_from, config.objective.teacher)
    )
    validation = TokenDataset.open(dataset.path, "val")
    return Sources(dataset, train, validation, tokenizer, initial, teacher)


def _load(path: str, tokenizer: Tokenizer) -> LoadedModel:
    loaded = load_model(path, dtype="float32")
    check_vocab(loaded.config, tokenizer.vocab_size)
    check_tokenizer(loaded, tokenizer)
    return loaded


def use_machine(config: TrainConfig) -> None:
    """Set, for the whole process, what decides the bits of a result: threads, kernels."""
    torch.set_num_threads(config.threads if config.threads != "auto" else usable_cores())
    if choose_device(config.device) == "cpu":
        keep_freed_memory(_HEAP_BYTES)
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def resolve_for(config: TrainConfig, sources: Sources) -> Resolved:
    """Resolve a recipe on this machine; call `use_machine` first."""
    device = choose_device(config.device)
    fast = has_fast_bfloat16(device)
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if fast else "float32"
    facts = Facts(
        vocab_size=sources.tokenizer.vocab_size,
        train_tokens=sources.train.num_tokens,
        eos_token_id=sources.tokenizer.eos_token_id,
        bos_token_id=sources.tokenizer.bos_token_id,
        device=device,
        fast_bfloat16=fast,
        compiler=has_compiler(device),
        threads=torch.get_num_threads(),
        peak_flops=measured_peak(device, DTYPES[precision]),
        model=sources.initial.config if sources.initial else None,
        examples=None if sources.train.index.content == "text" else sources.train.num_documents,
        longest=longest_example(sources.train, sources.validation),
    )
    return resolve(config, facts)


@dataclass
class Build:
    """A run's parts, at step 0."""

    model: Decoder
    optimizer: Optimizer
    step: TrainStep
    loader: BatchLoader | ExampleLoader
    validator: Validator


def build(config: TrainConfig, model_config: ModelConfig, sources: Sources) -> Build:
    """Make the parts of a resolved config; equal configs give equal bits."""
    batch = config.batch
    assert isinstance(batch.sequence_length, int) and isinstance(batch.micro_batch_size, int)
    assert isinstance(batch.loss_chunk_tokens, int) and isinstance(config.compile, bool)
    loader = loader_class(sources.train)(
        sources.train,
        batch_size=batch.micro_batch_size,
        sequence_length=batch.sequence_length,
        seed=config.seed,
    )
    model = Decoder(model_config)
    if sources.initial is not None:
        model.load_state_dict(sources.initial.model.state_dict())
    else:
        model.init_weights(torch.Generator().manual_seed(config.seed))
    if config.lora.rank:
        add_adapters(model, config.lora, torch.Generator().manual_seed(config.seed))
    model.to(config.device)
    objective = make_objective(config, model_config, sources.initial, sources.teacher)
    optimizer = Optimizer(model, config.optimizer)
    options = StepOptions(
        chunk_tokens=batch.loss_chunk_tokens,
        dtype=DTYPES[config.precision],
        clip_norm=config.optimizer.clip_norm,
        compile=config.compile,
    )
    validator = Validator(
        sources.validation,
        sources.tokenizer,
        config.validation,
        context_length=batch.sequence_length,
        dtype=config.precision,
        seed=config.seed,
        objective=objective,
    )
    step = TrainStep(model, optimizer, options, objective)
    return Build(model, optimizer, step, loader, validator)


def fit_minutes(config: TrainConfig, parts: Build, clock: Clock, started: float) -> TrainConfig:
    """Measure real steps and set as many as fit into `config.minutes`; `parts` are as before.

    What has passed since `started` (compiling included), the validations to come as timed
    once, and a reserve for saves are taken off the budget.

    Raises:
        TrainingError: A step of the measurement gave no finite loss.
    """
    assert config.minutes is not None and isinstance(config.batch.tokens_per_step, int)
    log = get_logger("train")
    log.info("measuring the speed of a step", compile=config.compile)
    budget = 60 * config.minutes
    rows = parts.loader.batch_size * parts.loader.sequence_length
    accumulation = config.batch.tokens_per_step // rows
    initial = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    cursor = parts.loader.state()
    step_seconds = _time_steps(parts, accumulation, _MEASURE_SHARE * budget, clock)
    parts.model.load_state_dict(initial)
    parts.optimizer.load_state_dict({})
    parts.loader.load_state(cursor)
    begin = clock.monotonic()
    parts.validator.score(parts.model)
    now = clock.monotonic()
    # Ten validations by default; the rest of the reserve is for saves.
    left = (1 - _RESERVE) * budget - (now - started) - 10 * (now - begin)
    steps = max(1, int(left / step_seconds))
    log.info("fitted to the time", minutes=config.minutes, steps=steps, step_seconds=step_seconds)
    return with_steps(config, steps)


def _time_steps(parts: Build, accumulation: int, seconds: float, clock: Clock) -> float:
    """Return the median duration of steps run for about `seconds`, after one that warms up."""
    least, most = _MEASURE_STEPS
    durations: list[float] = []
    deadline = math.inf
    while len(durations) < least or (len(durations) < most and clock.monotonic() < deadline):
        batches = [parts.loader.next_batch() for _ in range(accumulation)]
        begin = clock.monotonic()
        try:
            parts.step.run(batches, 0.01)
        except NonFiniteError as error:
            raise TrainingError(f"no finite loss at the start: {error}") from None
        if deadline == math.inf:  # the first step compiles, and is not counted
            deadline = clock.monotonic() + seconds
        else:
            durations.append(clock.monotonic() - begin)
    return statistics.median(durations)
