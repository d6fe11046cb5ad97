"""The parts of a run, made from its resolved config: model, optimizer, step, data, validator."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass, replace

import torch

from minigpt.core.artifact import Artifact, is_artifact
from minigpt.core.clock import Clock
from minigpt.core.errors import TrainingError
from minigpt.core.machine import usable_cores
from minigpt.core.manifest import Parent
from minigpt.core.telemetry import get_logger
from minigpt.data.loader import Batch, SampleLoader
from minigpt.data.skip_list import SkipList
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.training_data import Documents, TrainingData, open_training_data
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import add_draft_heads
from minigpt.model.lora import add_adapters
from minigpt.model.weights import LoadedModel, check_vocab, load_model
from minigpt.train.allocator import keep_freed_memory
from minigpt.train.config import MeshConfig, TrainConfig
from minigpt.train.low_bit import check_state_bits
from minigpt.train.machine import (
    available_memory,
    choose_device,
    has_compiler,
    has_fast_bfloat16,
    measured_peak,
)
from minigpt.train.memory import check_fits, layers_to_recompute
from minigpt.train.mesh import AXES, Mesh, check_model
from minigpt.train.objectives import check_content, check_tokenizer, make_objective
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import check_compression, gathered, spread
from minigpt.train.pipeline_parallel import Cut, Stage, count_pieces
from minigpt.train.precision import check_offload, check_precision, product_dtype, use_float8
from minigpt.train.resolve import Facts, Resolved, resolve, with_steps
from minigpt.train.step import NonFiniteError, StepOptions, TrainStep
from minigpt.train.tree import check_tree
from minigpt.train.validation import Validator
from minigpt.train.workload import describe_workload

_HEAP_BYTES = 4 << 30  # address space, not memory
_MEASURE_SHARE = 0.05
_MEASURE_STEPS = (3, 30)
_RESERVE = 0.03  # for saves
_DEFAULT_VALIDATIONS = 10


@dataclass(frozen=True)
class Sources:
    """What a run reads: its dataset or a mixture's, opened, and the weights to start from."""

    train: TrainingData
    validation: Documents
    tokenizer: Tokenizer
    initial: LoadedModel | None
    teacher: LoadedModel | None = None

    @property
    def parents(self) -> list[Artifact | Parent]:
        """What the run's checkpoints and its model come from."""
        models = [m for m in (self.initial, self.teacher) if m is not None and is_artifact(m.path)]
        weights = [Parent(id=m.id, kind="model", uri=str(m.path)) for m in models]
        return [*self.train.artifacts.values(), *weights]

    @property
    def fingerprint(self) -> str:
        """A hash of the datasets' files: equal for ones that were prepared again alike."""
        return self.train.fingerprint


def open_sources(config: TrainConfig, dataset: Artifact) -> Sources:
    """Open everything the run reads.

    Raises:
        DataError: A training split is empty, or a mixture's tokenizers differ.
        ConfigError: The dataset's content is not the objective's.
        ModelError: The weights to initialize from, or the teacher, don't fit the tokenizer.
    """
    train = open_training_data(config.data, dataset)
    check_content(config.objective.kind, train.content, train.uri)
    tokenizer = Tokenizer.load(train.tokenizer_dir)
    initial, teacher = (
        None if path is None else _load(path, tokenizer)
        for path in (config.initialize_from, config.objective.teacher)
    )
    return Sources(train, train.validation, tokenizer, initial, teacher)


def _load(path: str, tokenizer: Tokenizer) -> LoadedModel:
    loaded = load_model(path, dtype="float32")
    check_vocab(loaded.config, tokenizer.vocab_size)
    check_tokenizer(loaded, tokenizer)
    return loaded


def use_machine(config: TrainConfig) -> None:
    """Set, for the whole process, what decides the bits of a result: threads, kernels."""
    share = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(config.threads if config.threads != "auto" else share)
    if choose_device(config.device) == "cpu":
        keep_freed_memory(_HEAP_BYTES)
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def resolve_for(config: TrainConfig, sources: Sources) -> Resolved:
    """Resolve a recipe on this machine; call `use_machine` first.

    Raises:
        ConfigError: Values that can't work together, or not on this machine.
    """
    device = choose_device(config.device)
    check_precision(config.precision, device)
    check_offload(config, device)
    check_state_bits(config, has_compiler(device))
    check_compression(config.mesh.compress, device)
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
        peak_flops=measured_peak(device, product_dtype(precision)),
        model=sources.initial.config if sources.initial else None,
        examples=sources.train.num_examples,
        longest=sources.train.longest_example,
    )
    resolved = resolve(config, facts)
    check_mesh(resolved.config, resolved.model)
    fixed = _fix_recomputation(resolved.config, resolved.model)
    teacher = sources.teacher.config if sources.teacher else None
    check_fits(fixed, resolved.model, available_memory(device), teacher)
    return replace(resolved, config=fixed)


def _fix_recomputation(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """Turn a budget for activations into a number of layers."""
    memory = config.memory
    if memory.checkpoint_layers is not None or memory.budget_mb is None:
        return config
    layers = layers_to_recompute(describe_workload(config, model), memory.budget_mb * 10**6)
    return config.replace(memory=memory.replace(checkpoint_layers=layers))


def check_mesh(config: TrainConfig, model: ModelConfig) -> None:
    """Refuse a mesh that a resolved config's model and batch can't be spread over.

    Raises:
        ConfigError: See `mesh.check_model` and `tree.check_tree`.
    """
    batch = config.batch
    assert isinstance(batch.sequence_length, int)
    count = micro_batches(config)
    check_model(config.mesh, model, micro_batches=count, sequence_length=batch.sequence_length)
    if config.mesh.pp > 1:
        share = count // config.mesh.data_size
        assert isinstance(batch.micro_batch_size, int)
        count_pieces(config.mesh, share, share * batch.micro_batch_size)
    if config.mesh.reduce == "tree":
        check_tree(count, config.mesh.data_size)


def micro_batches(config: TrainConfig) -> int:
    """Return how many micro-batches a resolved config's global batch has, over all ranks."""
    batch = config.batch
    assert isinstance(batch.tokens_per_step, int) and isinstance(batch.sequence_length, int)
    assert isinstance(batch.micro_batch_size, int)
    return batch.tokens_per_step // (batch.sequence_length * batch.micro_batch_size)


def take_batches(loader: SampleLoader, mesh: Mesh, count: int) -> list[Batch]:
    """Move a loader past a global batch of `count` micro-batches; return this data rank's."""
    first = loader.next_sample
    loader.next_sample += count * loader.batch_size
    return [loader.batch_at(first + m * loader.batch_size) for m in mesh.micro_batches(count)]


@dataclass
class Build:
    """A run's parts, at step 0."""

    model: Decoder | Stage
    """Spread over the mesh: its parameters may be shards."""
    optimizer: Optimizer
    step: TrainStep
    loader: SampleLoader
    validator: Validator
    mesh: Mesh
    cut: Cut | None = None
    """This rank's stages of a pipeline."""

    def whole_model(self) -> Decoder:
        """Return a model that one device can run and save; every rank must join.

        The model itself where it is whole on each rank, else a copy, see `parallelize.gathered`.
        """
        if isinstance(self.model, Decoder) and self.mesh.size(*AXES) == self.mesh.size("dp"):
            return self.model
        return gathered(self.model, self.mesh)


def build_loader(config: TrainConfig, data: TrainingData) -> SampleLoader:
    """Make the loader of a resolved config, at its first sample."""
    batch = config.batch
    assert isinstance(batch.sequence_length, int) and isinstance(batch.micro_batch_size, int)
    assert isinstance(batch.tokens_per_step, int)
    return data.loader(
        batch_size=batch.micro_batch_size,
        sequence_length=batch.sequence_length,
        samples_per_step=batch.tokens_per_step // batch.sequence_length,
        seed=config.seed,
        packing=batch.packing,
        skip_list=config.skip_list if isinstance(config.skip_list, SkipList) else None,
    )


def build(
    config: TrainConfig, model_config: ModelConfig, sources: Sources, mesh: Mesh | None = None
) -> Build:
    """Make the parts of a resolved config; equal configs give equal bits.

    Args:
        config: Without "auto", `steps` aside.
        model_config: The architecture.
        sources: What the run reads.
        mesh: The processes of the run, which all call this; None is this one alone.
    """
    mesh = mesh or Mesh(MeshConfig())
    batch = config.batch
    assert isinstance(batch.sequence_length, int) and isinstance(batch.micro_batch_size, int)
    assert isinstance(batch.loss_chunk_tokens, int) and isinstance(config.compile, bool)
    loader = build_loader(config, sources.train)
    model = Decoder(model_config)
    if sources.initial is not None:
        model.load_state_dict(sources.initial.model.state_dict())
    else:
        model.init_weights(torch.Generator().manual_seed(config.seed))
    if config.lora.rank:
        add_adapters(model, config.lora, torch.Generator().manual_seed(config.seed))
    elif config.objective.kind == "draft-heads":
        generator = torch.Generator().manual_seed(config.seed)
        add_draft_heads(model, model_config, generator)
    model.to(config.device)
    objective = make_objective(config, model_config, sources.initial, sources.teacher)
    dtype = product_dtype(config.precision)
    if config.precision == "float8":
        use_float8(model)
    laid = spread(model, mesh, dtype=dtype, offload=config.memory.offload_optimizer)
    optimizer = Optimizer(laid.model, config.optimizer)
    options = StepOptions(
        chunk_tokens=batch.loss_chunk_tokens,
        dtype=dtype,
        clip_norm=config.optimizer.clip_norm,
        compile=config.compile,
        memory=config.memory,
        # Beside adapters or heads all else is frozen, and not saved.
        router_bias_rate=config.optimizer.router_bias_rate if config.trains_all else 0.0,
    )
    validator = Validator(
        sources.validation,
        sources.tokenizer,
        config.validation,
        context_length=batch.sequence_length,
        dtype=str(dtype).removeprefix("torch."),
        seed=config.seed,
        objective=objective,
    )
    step = TrainStep(laid.model, optimizer, options, objective, spread=laid)
    return Build(laid.model, optimizer, step, loader, validator, mesh, laid.cut)


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
    initial = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    cursor = parts.loader.state()
    step_seconds = _time_steps(parts, micro_batches(config), _MEASURE_SHARE * budget, clock)
    parts.model.load_state_dict(initial)
    parts.optimizer.load_state_dict({})
    parts.step.load_state({})
    parts.loader.load_state(cursor)
    begin = clock.monotonic()
    parts.validator.score(parts.whole_model())
    now = clock.monotonic()
    validation_seconds = now - begin
    every = config.validation.every
    # By default a tenth of the steps; in any case one at the end.
    validations = _DEFAULT_VALIDATIONS if every == "auto" else 1
    left = (1 - _RESERVE) * budget - (now - started) - validations * validation_seconds
    if isinstance(every, int) and every > 0:
        step_seconds += validation_seconds / every
    steps = max(1, int(_mean_over_ranks(left / step_seconds, parts.mesh)))
    log.info("fitted to the time", minutes=config.minutes, steps=steps, step_seconds=step_seconds)
    return with_steps(config, steps)


def _mean_over_ranks(value: float, mesh: Mesh) -> float:
    """Make ranks, whose clocks differ, agree on a number."""
    total = torch.tensor(value, dtype=torch.float64, device=mesh.device_type)
    return float(mesh.sum(total, *AXES)) / mesh.size(*AXES)


def _time_steps(parts: Build, count: int, seconds: float, clock: Clock) -> float:
    """Return the median duration of steps run for about `seconds`, after one that warms up."""
    least, most = _MEASURE_STEPS
    durations: list[float] = []
    deadline = math.inf
    while len(durations) < least or (
        len(durations) < most and _mean_over_ranks(clock.monotonic() - deadline, parts.mesh) < 0
    ):
        batches = take_batches(parts.loader, parts.mesh, count)
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
