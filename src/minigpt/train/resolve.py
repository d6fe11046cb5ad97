"""From the `size` dial, the dataset and the machine to every number of a run.

`resolve` is pure: equal inputs give equal configs. Its rules are estimates that work from a
laptop's minutes to a GPU's hours, and every one of them can be overridden by the recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.train.config import (
    BatchConfig,
    CheckpointConfig,
    ModelOverrides,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

_HEAD_DIM = 64
_TOKENS_PER_PARAMETER = 12
"""Near the compute optimum per (matrix + head) parameter that nanochat measures (10.5)."""
_EXPECTED_MFU = 0.4
_COMPILE_PAYS_SECONDS = 60.0
_CHUNK_LOGITS = 1 << 24
_REFERENCE_TOKENS, _REFERENCE_BATCH, _BATCH_EXPONENT = 1.1e9, 1 << 19, 0.383
_LEAST_STEPS = 1000
_REFERENCE_WIDTH, _REFERENCE_STEP_TOKENS = 384, 8192
_TUNING_RATES = {"pretrain": 1.0, "distill": 1.0, "sft": 0.1, "dpo": 0.01}
"""Of pre-training's rates, where given weights are tuned."""
_ADAPTER_RATES = 10.0
"""Adapters take about ten times the rate of all weights
(https://thinkingmachines.ai/blog/lora)."""
_EPOCHS = {"sft": 3, "dpo": 1, "distill": 3}
"""Over examples, which are few; texts follow the parameters."""


@dataclass(frozen=True)
class Facts:
    """What resolving needs to know beyond the recipe."""

    vocab_size: int
    """Of the dataset's tokenizer."""
    train_tokens: int
    """Tokens in the dataset's training split."""
    eos_token_id: int | None
    bos_token_id: int | None
    device: str
    fast_bfloat16: bool
    compiler: bool
    threads: int
    peak_flops: float
    """Measured matrix peak in the run's precision, FLOP/s."""
    model: ModelConfig | None = None
    """The architecture of `initialize_from`, which then rules."""
    examples: int | None = None
    """Documents in the training split, where they are conversations or answers and are kept
    whole; None for texts."""
    longest: int = 0
    """Tokens of the longest of those, of either split."""


@dataclass(frozen=True)
class Resolved:
    """A config without "auto" (`steps` aside, where `minutes` rules), and what comes of it."""

    config: TrainConfig
    model: ModelConfig
    warnings: tuple[str, ...]


def resolve(config: TrainConfig, facts: Facts) -> Resolved:
    """Derive every "auto" but `steps` under `minutes`, which takes a measurement.

    Raises:
        ConfigError: Values that can't work together; the message names them.
    """
    sequence_length = _choose(config.batch.sequence_length, _sequence_length(config, facts))
    overrides, model = _resolve_model(config, facts, sequence_length)
    if facts.longest > model.context_length:
        raise ConfigError(
            f"the dataset's longest example has {facts.longest} tokens, the model's context "
            f"{model.context_length}",
            remedy=f"prepare the dataset with chat.max_tokens={model.context_length}",
        )
    if sequence_length > model.context_length:
        raise ConfigError(
            f"batch.sequence_length = {sequence_length} exceeds the model's context of "
            f"{model.context_length} tokens",
            remedy=f"--set batch.sequence_length={model.context_length}",
        )
    tokens = _token_budget(config, facts, model, sequence_length)
    batch = _resolve_batch(config, facts, sequence_length, model, tokens)
    assert batch.tokens_per_step != "auto"
    # Final, or where `minutes` decides a first idea.
    steps = _choose(config.steps, max(1, round(tokens / batch.tokens_per_step)))
    tokens = float(steps * batch.tokens_per_step)
    seconds = tokens * model.flops_per_token(sequence_length) / facts.peak_flops / _EXPECTED_MFU
    resolved = config.replace(
        model=overrides,
        batch=batch,
        optimizer=_resolve_optimizer(config, model, batch.tokens_per_step),
        device=facts.device,
        precision=_choose(config.precision, "bfloat16" if facts.fast_bfloat16 else "float32"),
        compile=_choose(config.compile, facts.compiler and seconds > _COMPILE_PAYS_SECONDS),
        threads=_choose(config.threads, facts.threads),
    )
    if config.steps != "auto" or config.max_tokens is not None or config.minutes is None:
        resolved = with_steps(resolved, steps)
    return Resolved(resolved, model, tuple(_warnings(resolved, facts, tokens)))


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """Set the number of steps and everything that is derived from it.

    Raises:
        ConfigError: The warmup does not fit.
    """
    warmup = _choose(config.schedule.warmup_steps, min(200, math.ceil(steps / 50)))
    if warmup > steps:
        raise ConfigError(
            f"schedule.warmup_steps = {warmup} exceeds steps = {steps}",
            remedy="lower it or train longer",
        )
    every = _choose(config.validation.every, max(1, math.ceil(steps / 10)))
    return config.replace(
        steps=steps,
        schedule=ScheduleConfig(**dict(config.schedule) | {"warmup_steps": warmup}),
        validation=ValidationConfig(**dict(config.validation) | {"every": every}),
        checkpoint=CheckpointConfig(
            **dict(config.checkpoint) | {"every": _choose(config.checkpoint.every, every)}
        ),
    )


T = TypeVar("T")


def _choose(value: T | str, derived: T) -> T:
    return derived if value == "auto" else value  # type: ignore[return-value]


def _sequence_length(config: TrainConfig, facts: Facts) -> int:
    by_size = 256 if config.size <= 6 else 512 if config.size <= 8 else 1024
    by_size = 2048 if config.size > 16 else by_size
    limits = [config.model.context_length, facts.model.context_length if facts.model else "auto"]
    by_limits = [limit for limit in limits if isinstance(limit, int)]
    if config.objective.kind == "dpo" and facts.examples is not None:
        return min([8 * math.ceil(facts.longest / 8), *by_limits])  # a row is one answer
    return max(min([by_size, *by_limits]), facts.longest)  # an example is never cut


def _resolve_model(
    config: TrainConfig, facts: Facts, sequence_length: int
) -> tuple[ModelOverrides, ModelConfig]:
    given = config.model
    if facts.model is not None:
        return _adopt_model(given, facts)
    vocab_size = _choose(given.vocab_size, facts.vocab_size)
    if vocab_size < facts.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {vocab_size}, but the dataset's tokenizer has "
            f"{facts.vocab_size} tokens",
            remedy="leave it at auto",
        )
    hidden_size = _choose(given.hidden_size, _HEAD_DIM * config.size)
    head_dim = given.head_dim
    if head_dim == "auto" and given.num_heads != "auto":
        _require_divisible("model.hidden_size", hidden_size, "model.num_heads", given.num_heads)
        head_dim = hidden_size // given.num_heads
    elif head_dim == "auto":
        head_dim = _head_dim(hidden_size)
    num_heads = given.num_heads
    if num_heads == "auto":
        _require_divisible("model.hidden_size", hidden_size, "model.head_dim", head_dim)
        num_heads = hidden_size // head_dim
    ratio = 8 / 3 if given.mlp == "swiglu" else 4.0
    resolved = given.replace(
        vocab_size=vocab_size,
        num_layers=_choose(given.num_layers, config.size),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_choose(given.num_kv_heads, num_heads),
        head_dim=head_dim,
        intermediate_size=_choose(
            given.intermediate_size, max(32, 32 * round(ratio * hidden_size / 32))
        ),
        context_length=_choose(given.context_length, sequence_length),
    )
    tokens = {"eos_token_id": facts.eos_token_id, "bos_token_id": facts.bos_token_id}
    return resolved, from_mapping(ModelConfig, dict(resolved) | tokens, origin="model")


def _head_dim(hidden_size: int) -> int:
    """Return the widest usual head that divides the width, or else the width itself."""
    return next((d for d in range(_HEAD_DIM, 7, -8) if hidden_size % d == 0), hidden_size)


def _adopt_model(given: ModelOverrides, facts: Facts) -> tuple[ModelOverrides, ModelConfig]:
    """Take the architecture of the given weights; what the recipe sets must agree with it."""
    assert facts.model is not None
    adopted = ModelOverrides(**{k: getattr(facts.model, k) for k in ModelOverrides.model_fields})
    for name in given.model_fields_set:
        wanted, found = getattr(given, name), getattr(adopted, name)
        if wanted not in ("auto", found):
            raise ConfigError(
                f"model.{name} = {wanted}, but the weights to initialize from have {found}",
                remedy="leave it out",
            )
    return adopted, facts.model


def _token_budget(
    config: TrainConfig, facts: Facts, model: ModelConfig, sequence_length: int
) -> float:
    """Tokens that the run will see: given, or expected within `minutes`, or by parameters."""
    if config.steps != "auto" and config.batch.tokens_per_step != "auto":
        return float(config.steps * config.batch.tokens_per_step)
    if config.max_tokens is not None:
        return float(config.max_tokens)
    if config.minutes is not None:
        speed = _EXPECTED_MFU * facts.peak_flops / model.flops_per_token(sequence_length)
        return 60 * config.minutes * speed
    if facts.examples is not None:
        return float(_EPOCHS[config.objective.kind] * _rows(config, facts, sequence_length)) * (
            sequence_length
        )
    return float(_TOKENS_PER_PARAMETER * model.parameter_counts().matmul)


def _resolve_batch(
    config: TrainConfig, facts: Facts, sequence_length: int, model: ModelConfig, tokens: float
) -> BatchConfig:
    given = config.batch
    windows = _rows(config, facts, sequence_length)
    group = 2 if config.objective.kind == "dpo" else 1  # a pair's rows stay together
    least = group if given.micro_batch_size == "auto" else given.micro_batch_size
    if given.tokens_per_step == "auto":
        ideal = _REFERENCE_BATCH * (tokens / _REFERENCE_TOKENS) ** _BATCH_EXPONENT
        ideal = min(ideal, tokens / _LEAST_STEPS)
        rows = max(8, 2 ** round(math.log2(max(1.0, ideal / sequence_length))))
        rows = max(1, min(rows, windows) // least) * least
    else:
        rows = given.tokens_per_step // sequence_length
    if rows > windows:
        raise ConfigError(
            f"the dataset's training split has {facts.train_tokens:,} tokens, fewer than one "
            f"batch of {rows} rows of batch.sequence_length = {sequence_length}",
            remedy="add data, or lower batch.tokens_per_step or batch.sequence_length",
        )
    tokens_per_step = _choose(given.tokens_per_step, rows * sequence_length)
    _require_divisible(
        "batch.tokens_per_step", tokens_per_step, "batch.sequence_length", sequence_length
    )
    most = max(1, (8192 if facts.device == "cpu" else 65536) // sequence_length)
    _require_divisible("batch.tokens_per_step / batch.sequence_length", rows, "rows a pair", group)
    sizes = range(group, max(group, min(most, rows)) + 1, group)
    divisor = max(size for size in sizes if rows % size == 0)
    micro = _choose(given.micro_batch_size, divisor)
    _require_divisible("batch.micro_batch_size", micro, "rows a pair", group)
    _require_divisible(
        "batch.tokens_per_step / batch.sequence_length", rows, "batch.micro_batch_size", micro
    )
    chunk = min(micro * sequence_length, max(128, _CHUNK_LOGITS // model.vocab_size))
    return BatchConfig(
        sequence_length=sequence_length,
        tokens_per_step=tokens_per_step,
        micro_batch_size=micro,
        loss_chunk_tokens=_choose(given.loss_chunk_tokens, chunk),
    )


def _rows(config: TrainConfig, facts: Facts, sequence_length: int) -> int:
    """Return how many rows an epoch has; of packed conversations the fewest possible."""
    if config.objective.kind == "dpo" and facts.examples is not None:
        return facts.examples
    if facts.examples is not None:
        return math.ceil(facts.train_tokens / sequence_length)
    return (facts.train_tokens - 1) // sequence_length


def _resolve_optimizer(
    config: TrainConfig, model: ModelConfig, tokens_per_step: int
) -> OptimizerConfig:
    """Rates fall with the root of the width and grow with the root of the batch."""
    given = config.optimizer
    share = 1.0 if config.initialize_from is None else _TUNING_RATES[config.objective.kind]
    if config.lora.rank:
        share *= _ADAPTER_RATES
    scale = min(2.0, math.sqrt(tokens_per_step / _REFERENCE_STEP_TOKENS))
    width = math.sqrt(_REFERENCE_WIDTH / model.hidden_size)
    lr = (3e-3 if given.kind == "muon" else 1e-3) * width * scale
    muon_lr = 0.02 * scale
    return given.replace(
        lr=_choose(given.lr, _round(min(1.0, share * lr))),
        muon_lr=_choose(given.muon_lr, _round(min(1.0, share * muon_lr))),
    )


def _warnings(config: TrainConfig, facts: Facts, tokens: float) -> list[str]:
    warnings = []
    epochs = tokens / facts.train_tokens
    if epochs > 8:
        warnings.append(
            f"the run sees its {facts.train_tokens:,} training tokens {epochs:.0f} times; "
            "expect overfitting: add data or train a smaller model"
        )
    if config.precision == "bfloat16" and not facts.fast_bfloat16:
        warnings.append("precision = bfloat16 is emulated here and slow; float32 is faster")
    if config.compile is True and not facts.compiler:
        raise ConfigError("compile = true, but no C++ compiler is here", remedy="install g++")
    if config.compile is False and not facts.compiler:
        warnings.append("no C++ compiler is here: training runs uncompiled, which is slower")
    if config.threads != "auto" and config.threads > 2 * facts.threads:
        warnings.append(f"threads = {config.threads} on {facts.threads} cores is slow")
    return warnings


def _require_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor or value < divisor:
        raise ConfigError(
            f"{name} = {value} is not a multiple of {divisor_name} = {divisor}",
            remedy="choose values that divide",
        )


def _round(value: float) -> float:
    return float(f"{value:.2g}")
