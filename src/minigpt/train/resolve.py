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
    MeshConfig,
    ModelOverrides,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

_HEAD_DIM = 64
_TOKENS_PER_PARAMETER = 12
"""Near the compute optimum per (matrix + head) parameter that nanochat measures (10.5)."""
_SMALL_MODEL, _SMALL_EXPONENT = 1e8, 0.45
"""Below that many parameters fewer tokens do: 1.5 per parameter at one million, as measured in
minutes of training on two kinds of machine (docs/lab-notes.md)."""
_DEFAULT_SIZE, _LARGEST_SIZE = 4, 128
_EXPECTED_MFU = 0.4
_CPU_CHANNEL_SECONDS = 1e-7
"""What a token costs a CPU thread besides the matrix products, per layer and channel."""
_TRAINING_SHARE = 0.8
"""Of a budget in minutes; the rest is imports, compiling, validation and saves."""
_COMPILE_PAYS_SECONDS = 60.0
_CHUNK_LOGITS = 1 << 24
_REFERENCE_TOKENS, _REFERENCE_BATCH, _BATCH_EXPONENT = 1.1e9, 1 << 19, 0.383
_LEAST_STEPS = 1000
_REFERENCE_WIDTH, _REFERENCE_STEP_TOKENS = 384, 8192
_TUNING_RATES = {"pretrain": 1.0, "distill": 1.0, "sft": 0.1, "dpo": 0.01, "draft-heads": 1.0}
"""Of pre-training's rates, where given weights are tuned."""
_ADAPTER_RATES = 10.0
"""Adapters take about ten times the rate of all weights
(https://thinkingmachines.ai/blog/lora)."""
_EPOCHS = {"sft": 3, "dpo": 1, "distill": 3, "draft-heads": 3}
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
    config = config.replace(size=_resolve_size(config, facts))
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
    seconds = tokens * _token_seconds(facts, model, sequence_length) / config.mesh.size
    # With experts, which stay uncompiled, nobody has measured that it pays.
    compiles = facts.compiler and not model.num_experts and not _uncompilable(config.mesh)
    resolved = config.replace(
        model=overrides,
        batch=batch,
        optimizer=_resolve_optimizer(config, model, batch.tokens_per_step),
        device=facts.device,
        precision=_choose(config.precision, "bfloat16" if facts.fast_bfloat16 else "float32"),
        compile=_choose(config.compile, compiles and seconds > _COMPILE_PAYS_SECONDS),
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


def _resolve_size(config: TrainConfig, facts: Facts) -> int:
    """Return the largest size that the budget trains well, the usual one without a budget."""
    if config.size != "auto":
        return config.size
    if facts.model is not None:
        return facts.model.num_layers
    if config.minutes is None and config.max_tokens is None:
        return _DEFAULT_SIZE
    best = 1
    for size in range(1, _LARGEST_SIZE + 1):
        sized = config.replace(size=size)
        length = _choose(config.batch.sequence_length, _sequence_length(sized, facts))
        _, model = _resolve_model(sized, facts, length)
        if _token_budget(sized, facts, model, length) < _tokens_wanted(model):
            break
        best = size
    return best


def _tokens_wanted(model: ModelConfig) -> float:
    parameters = model.parameter_counts().matmul
    smallness = math.pow(min(1.0, parameters / _SMALL_MODEL), _SMALL_EXPONENT)
    return _TOKENS_PER_PARAMETER * smallness * parameters


def _token_seconds(facts: Facts, model: ModelConfig, sequence_length: int) -> float:
    """Estimate the time of a token, forward and backward, on one rank."""
    products = model.flops_per_token(sequence_length) / facts.peak_flops
    if facts.device != "cpu":
        return products / _EXPECTED_MFU
    channels = model.num_layers * model.hidden_size
    return products + channels * _CPU_CHANNEL_SECONDS / facts.threads


def _sequence_length(config: TrainConfig, facts: Facts) -> int:
    assert config.size != "auto"
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
    assert config.size != "auto"
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
        seconds = _TRAINING_SHARE * 60 * config.minutes
        return config.mesh.size * seconds / _token_seconds(facts, model, sequence_length)
    if facts.examples is not None:
        rows = _rows(config, facts, sequence_length)
        return float(_EPOCHS[config.objective.kind] * rows * sequence_length)
    return float(_TOKENS_PER_PARAMETER * model.parameter_counts().matmul)


def _resolve_batch(
    config: TrainConfig, facts: Facts, sequence_length: int, model: ModelConfig, tokens: float
) -> BatchConfig:
    given, ranks = config.batch, config.mesh.data_size
    windows = _rows(config, facts, sequence_length)
    group = 2 if config.objective.kind == "dpo" else 1  # a pair's rows stay together
    least = group if given.micro_batch_size == "auto" else given.micro_batch_size
    if given.tokens_per_step == "auto":
        ideal = _REFERENCE_BATCH * (tokens / _REFERENCE_TOKENS) ** _BATCH_EXPONENT
        ideal = min(ideal, tokens / _LEAST_STEPS)
        rows = max(8, 2 ** math.floor(math.log2(max(1.0, ideal / sequence_length))))
        rows = max(1, min(rows, windows) // (least * ranks)) * least * ranks
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
    shares = [d for d in range(group, max(group, min(most, rows)) + 1, group) if rows % d == 0]
    # Every data rank gets as many micro-batches as the others, where the rows allow it.
    divisor = max([d for d in shares if rows // d % ranks == 0], default=group)
    micro = _choose(given.micro_batch_size, divisor)
    _require_divisible("batch.micro_batch_size", micro, "rows a pair", group)
    _require_divisible(
        "batch.tokens_per_step / batch.sequence_length", rows, "batch.micro_batch_size", micro
    )
    chunk = min(micro * sequence_length, max(128, _CHUNK_LOGITS // model.vocab_size))
    return given.replace(
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


def _uncompilable(mesh: MeshConfig) -> str:
    """Say what of a config can't be compiled; empty where all can."""
    if mesh.pp > 1 and mesh.schedule == "zero-bubble":
        return (
            "mesh.schedule = zero-bubble: a compiled layer's backward pass can't be split into "
            "its input's part and its weights'"
        )
    return ""


def _warnings(config: TrainConfig, facts: Facts, tokens: float) -> list[str]:
    warnings = []
    reason = _uncompilable(config.mesh)
    if config.compile is True and reason:
        raise ConfigError(f"compile = true with {reason}", remedy="--set compile=false")
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
