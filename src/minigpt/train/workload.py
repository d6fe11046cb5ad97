"""What a rank has to do in a step, taken from a resolved config, and its counts of parameters."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from minigpt.core.errors import ConfigError
from minigpt.model.config import LoraConfig, ModelConfig
from minigpt.model.draft_heads import count_parameters
from minigpt.train.config import MemoryConfig, TrainConfig
from minigpt.train.objective_config import ObjectiveConfig
from minigpt.train.pipeline_parallel import balance_layers, count_pieces

_MATMUL_ATTENTION_TOKENS = 1024
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Workload:
    """One rank's share of a model and of a step."""

    model: ModelConfig
    layers: int
    """Of this rank's pipeline stages."""
    recomputed_layers: int
    """Of those, how many have not all their activations kept."""
    is_first: bool
    """Whether the embedding is on this rank."""
    is_last: bool
    """Whether the last norm, the output projection and the loss are."""
    live_layers: int
    """Layers of all micro-batches whose activations exist at once; in a pipeline several's."""
    live_passes: int
    """Micro-batches, of each of a rank's pipeline stages, that are on their way."""
    waiting_layers: int
    """Layers that keep their outputs' gradients for their weights' later: zero-bubble's."""
    rows: int
    """Of a micro-batch."""
    length: int
    """Tokens of a row on this rank (context parallel ranks have a part)."""
    row_length: int
    """Tokens of a whole row."""
    tp: int
    ep: int
    shards: int
    """Ranks over which parameters are sharded (fsdp)."""
    zero3: bool
    accumulates: bool
    """Whether gradients of earlier micro-batches stand while one is computed."""
    narrow: bool
    """Whether matrix products are in two bytes."""
    muon: bool
    state_bytes: float
    """Of one of AdamW's two moments of a parameter."""
    chunk_tokens: int
    tree_lists: int
    """Sums of earlier gradients that `mesh.reduce` = tree holds during the last micro-batch."""
    matmul_attention: bool
    masked_attention: bool
    """Whether attention is torch's kernel with a mask of (T, T) a row."""
    fused_norm: bool
    keeps_buckets: bool
    """Whether torch's DDP holds the memory of gradients from step to step."""
    memory: MemoryConfig
    trains_all: bool
    """Whether the weights learn, not adapters or heads beside them."""
    heads: int
    """Elements of draft heads."""
    lora: LoraConfig
    objective: ObjectiveConfig
    frozen: ModelConfig | None
    """A second model that is whole on each rank: DPO's reference, distillation's teacher."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch on this rank."""
        return self.rows * self.length

    def learns(self, *projections: str) -> int:
        """Count which of a layer's projections learn."""
        return sum(self.trains_all or name in self.lora.targets for name in projections)

    def keeps_inputs(self, *projections: str) -> int:
        """Count which keep their inputs for a gradient; dropout puts others in their place."""
        return 0 if self.lora.dropout else self.learns(*projections)


def describe_workload(
    config: TrainConfig, model: ModelConfig, teacher: ModelConfig | None = None, stage: int = 0
) -> Workload:
    """Take from a resolved config what a rank has to do.

    Args:
        config: Resolved.
        model: The architecture that is trained.
        teacher: Distillation's.
        stage: The rank's place in a pipeline.
    """
    batch, mesh = config.batch, config.mesh
    assert isinstance(batch.sequence_length, int) and isinstance(batch.micro_batch_size, int)
    assert isinstance(batch.loss_chunk_tokens, int) and isinstance(batch.tokens_per_step, int)
    micro_batches = batch.tokens_per_step // (batch.sequence_length * batch.micro_batch_size)
    share = max(1, micro_batches // mesh.data_size)
    parts = _stages_of(config, model, stage)
    layers = [layer for part in parts for layer in part]
    pieces = _pieces(config, share)
    passes = _passes_ahead(config, pieces, stage)
    splits = mesh.pp > 1 and mesh.schedule == "zero-bubble"
    length = batch.sequence_length // mesh.cp
    is_tree = mesh.reduce == "tree"
    on_cpu = config.device == "cpu"
    short = mesh.cp == 1 and length <= _MATMUL_ATTENTION_TOKENS
    frozen = teacher
    if config.objective.kind == "dpo" and not config.lora.rank:
        frozen = model
    return Workload(
        model=model,
        layers=len(layers),
        recomputed_layers=_count_recomputed(config.memory, layers),
        is_first=0 in layers,
        is_last=model.num_layers - 1 in layers,
        live_layers=sum(len(parts[number]) for number in passes),
        live_passes=len(passes),
        waiting_layers=max(map(len, parts)) if splits else 0,
        rows=share * batch.micro_batch_size // pieces,
        length=length,
        row_length=batch.sequence_length,
        tp=mesh.tp,
        ep=mesh.ep,
        shards=mesh.fsdp,
        zero3=mesh.reshard == "zero3",
        accumulates=pieces > 1 and not is_tree,
        narrow=config.precision != "float32",
        muon=config.optimizer.kind == "muon" and config.trains_all,
        state_bytes=config.optimizer.state_bits / 8,
        chunk_tokens=batch.loss_chunk_tokens,
        tree_lists=share.bit_length() - 1 if is_tree else 0,
        matmul_attention=on_cpu and short,
        masked_attention=not (on_cpu and short),
        fused_norm=not on_cpu,
        keeps_buckets=mesh.size == mesh.dp > 1 and not is_tree,
        memory=config.memory,
        trains_all=config.trains_all,
        heads=count_parameters(model) if config.objective.kind == "draft-heads" else 0,
        lora=config.lora,
        objective=config.objective,
        frozen=frozen,
    )


def _pieces(config: TrainConfig, share: int) -> int:
    """Return how many pieces a rank's `share` of micro-batches makes: more in some pipelines."""
    mesh, rows = config.mesh, config.batch.micro_batch_size
    assert isinstance(rows, int)
    if mesh.pp > 1:
        with suppress(ConfigError):  # refused in its own words by `build.check_mesh`
            return count_pieces(mesh, share, share * rows)
    return share


def _passes_ahead(config: TrainConfig, pieces: int, stage: int) -> list[int]:
    """Return which of its stages a rank has run forward, and when, before it runs one backward.

    That is when a schedule has most activations.
    """
    mesh = config.mesh
    if mesh.pp == 1:
        return [0]
    if mesh.schedule == "gpipe":
        return [0] * pieces
    if mesh.schedule == "1f1b":
        return [0] * min(pieces, mesh.pp - stage)
    between = 1 if mesh.schedule == "zero-bubble" else 2
    a_round = pieces // max(1, pieces // mesh.pp)
    ahead = (mesh.virtual_stages - 1) * a_round + (mesh.pp - 1 - stage) * between
    count = min(ahead + 1, pieces * mesh.virtual_stages)
    return [number // a_round % mesh.virtual_stages for number in range(count)]


def _stages_of(config: TrainConfig, model: ModelConfig, stage: int) -> list[list[int]]:
    """Return a rank's layers, stage by stage, as `pipeline_parallel.cut_stages` deals them."""
    mesh, head = config.mesh, model.vocab_size * model.hidden_size
    stages = mesh.pp * mesh.virtual_stages
    if mesh.pp == 1 or model.num_layers < stages:
        return [list(range(model.num_layers))] * mesh.virtual_stages
    per_layer = (model.parameter_counts().matmul - head) / model.num_layers
    parts = balance_layers(model.num_layers, stages, last_extra=head / per_layer)
    return parts[stage :: mesh.pp]


def _count_recomputed(memory: MemoryConfig, layers: list[int]) -> int:
    if memory.checkpoint == "none":
        return 0
    if memory.checkpoint != "budget":
        return len(layers)
    first = memory.checkpoint_layers or 0  # none so far where it is yet to be found
    return sum(layer < first for layer in layers)


def projection_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of a layer's projections; of the MLP's those of one expert."""
    width, queries = model.hidden_size, model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    inner = inner_width(model)
    sizes = {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
    return {name: sizes[name] for name in sizes if name != "gate_proj" or model.mlp == "swiglu"}


def inner_width(model: ModelConfig) -> int:
    """Return the width inside an MLP, or an expert."""
    if model.num_experts and model.expert_intermediate_size:
        return model.expert_intermediate_size
    return model.intermediate_size


def layer_parameters(model: ModelConfig, tp: int, ep: int = 1) -> tuple[int, int]:
    """Return (matrix elements, other elements) of a layer on a rank."""

    def matrices(tp: int, ep: int) -> int:
        experts = model.num_experts // ep
        found = experts and model.num_experts * model.hidden_size  # the router
        for name, (inputs, outputs) in projection_sizes(model).items():
            whole = experts and name not in _ATTENTION  # tp leaves experts whole
            found += inputs * outputs * experts if whole else inputs * outputs // tp
        return found

    counts = model.parameter_counts()
    total = counts.total - root_parameters(model, 1)
    return matrices(tp, ep), total // model.num_layers - matrices(1, 1)


def adapter_parameters(model: ModelConfig, lora: LoraConfig, ep: int = 1) -> int:
    """Return the elements of a layer's adapters on a rank."""
    experts = max(1, model.num_experts // ep)
    return sum(
        lora.rank * (inputs + outputs) * (1 if name in _ATTENTION else experts)
        for name, (inputs, outputs) in projection_sizes(model).items()
        if name in lora.targets
    )


def root_parameters(
    model: ModelConfig, tp: int, *, is_first: bool = True, is_last: bool = True
) -> int:
    """Return how many elements embedding, head and the last norm have on a rank."""
    table = model.vocab_size * model.hidden_size
    has_table = is_first or (is_last and model.tie_embeddings)
    has_head = is_last and not model.tie_embeddings
    positions = model.parameter_counts().embedding - table
    norm = model.hidden_size * (2 if model.norm == "layernorm" else 1)
    return (has_table + has_head) * table // tp + is_first * positions + is_last * norm
