"""How much memory a step will take on a rank, estimated before anything is allocated.

The estimate follows the tensors of `model` and `train`, one by one: what a rank keeps from step to
step, what a micro-batch's forward pass saves, and the largest temporaries on top. It is checked
against the measured peak by `bench/memory.py`. Bytes throughout; memory of the process itself
(Python, torch: about 250 MB) and of other libraries is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.train.config import MemoryConfig, TrainConfig
from minigpt.train.tree import BUCKET_BYTES

_WIDE = 4  # bytes of float32
_MATMUL_ATTENTION_TOKENS = 1024


@dataclass(frozen=True)
class Workload:
    """One rank's share of a model and of a step."""

    model: ModelConfig
    layers: int
    """Of this rank's pipeline stage."""
    rows: int
    """Of a micro-batch."""
    length: int
    """Tokens of a row on this rank (context parallel ranks have a part)."""
    tp: int
    shards: int
    """Ranks over which parameters are sharded (fsdp)."""
    zero3: bool
    accumulates: bool
    """Whether a rank runs several micro-batches a step."""
    narrow: bool
    """Whether matrix products are in two bytes."""
    muon: bool
    state_bytes: float
    """Of one of AdamW's two moments of a parameter."""
    chunk_tokens: int
    tree_lists: int
    """Sums of earlier gradients that `mesh.reduce` = tree holds during the last micro-batch."""
    matmul_attention: bool
    fused_norm: bool
    keeps_buckets: bool
    """Whether torch's DDP holds the memory of gradients from step to step."""
    memory: MemoryConfig

    @property
    def tokens(self) -> int:
        """Of a micro-batch on this rank."""
        return self.rows * self.length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the rank that needs most, estimated."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What a micro-batch's forward pass keeps for the backward pass, the loss's part not."""
    loss: int
    """Logits of a chunk, and the loss's gradients."""
    gathered: int
    """fsdp: weights gathered from the shards, and their gradients before they are scattered."""
    peak: int
    """The most at any moment of a step; less than the sum, since not all exist at once."""


def describe_workload(config: TrainConfig, model: ModelConfig) -> Workload:
    """Take from a resolved config what a rank has to do."""
    batch, mesh = config.batch, config.mesh
    assert isinstance(batch.sequence_length, int) and isinstance(batch.micro_batch_size, int)
    assert isinstance(batch.loss_chunk_tokens, int) and isinstance(batch.tokens_per_step, int)
    micro_batches = batch.tokens_per_step // (batch.sequence_length * batch.micro_batch_size)
    share = max(1, micro_batches // mesh.data_size)
    length = batch.sequence_length // mesh.cp
    is_tree = mesh.reduce == "tree"
    return Workload(
        model=model,
        layers=-(-model.num_layers // mesh.pp),
        rows=batch.micro_batch_size,
        length=length,
        tp=mesh.tp,
        shards=mesh.fsdp,
        zero3=mesh.reshard == "zero3",
        accumulates=share > 1 and not is_tree,
        narrow=config.precision != "float32",
        muon=config.optimizer.kind == "muon",
        state_bytes=config.optimizer.state_bits / 8,
        chunk_tokens=batch.loss_chunk_tokens,
        tree_lists=share.bit_length() - 1 if is_tree else 0,
        matmul_attention=config.device == "cpu" and length <= _MATMUL_ATTENTION_TOKENS,
        fused_norm=config.device == "cuda",
        keeps_buckets=config.mesh.size == config.mesh.dp > 1 and not is_tree,
        memory=config.memory,
    )


def layer_parameters(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Return (matrix elements, other elements) of a layer on a tensor parallel rank."""
    counts = model.parameter_counts()
    head = model.vocab_size * model.hidden_size
    matrices = (counts.matmul - head) // model.num_layers
    final_norm = model.hidden_size * (2 if model.norm == "layernorm" else 1)
    untied = 0 if model.tie_embeddings else head
    total = (counts.total - counts.embedding - untied - final_norm) // model.num_layers
    return matrices // tp, total - matrices


def root_parameters(model: ModelConfig, tp: int) -> int:
    """Return how many elements embedding, head and the last norm have on a rank."""
    counts = model.parameter_counts()
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    positions = counts.embedding - model.vocab_size * model.hidden_size
    norm = model.hidden_size * (2 if model.norm == "layernorm" else 1)
    return vocabulary // tp + positions + norm


def layer_activations(work: Workload) -> int:
    """Return the bytes that one layer's forward pass keeps, nothing recomputed."""
    model, n, tp = work.model, work.tokens, work.tp
    size = 2 if work.narrow else _WIDE
    width, queries = model.hidden_size, model.num_heads * model.head_dim // tp
    keys, inner = model.num_kv_heads * model.head_dim // tp, model.intermediate_size // tp
    gated = model.mlp == "swiglu"
    kept = 2 * n // tp * width * _WIDE  # inputs of the two norms
    # Autocast makes a narrow copy of a norm's output for each projection that reads it.
    kept += n * width * ((3 + 1 + gated) * 2 if work.narrow else 2 * _WIDE)
    # On a CPU, RMSNorm is not fused and keeps the normalised input too, all in float32.
    if model.norm == "rmsnorm" and not work.fused_norm:
        kept += 2 * n // tp * width * _WIDE
    if model.qk_norm:
        kept += n * (queries + keys) * (size if work.fused_norm else 2 * _WIDE)
    grouped = model.num_kv_heads < model.num_heads and work.matmul_attention
    kept += n * (queries + 2 * (queries if grouped else keys)) * size  # query, key, value
    kept += n * queries * size  # attention's output
    if work.matmul_attention:
        kept += n * queries * size  # and its copy with heads side by side
        kept += n * work.length * (model.num_heads // tp) * size
    kept += n * inner * (4 if gated else 2) * size
    return kept


def kept_activations(work: Workload) -> int:
    """Return the bytes that all layers keep under the chosen recomputation."""
    whole, entry = layer_activations(work), work.tokens // work.tp * work.model.hidden_size * _WIDE
    if work.memory.offload_activations:
        return 2 * whole  # one layer's on their way out, one's on their way in
    if work.memory.checkpoint == "none":
        return work.layers * whole
    if work.memory.checkpoint == "selective":
        return work.layers * (entry + _linear_outputs(work))
    recomputed = work.layers
    if work.memory.checkpoint == "budget":
        assert work.memory.checkpoint_layers is not None
        recomputed = min(work.layers, work.memory.checkpoint_layers)
    return recomputed * entry + (work.layers - recomputed) * whole


def recomputed_activations(work: Workload) -> int:
    """Return the bytes that come into being again, a layer at a time, in the backward pass."""
    checkpoint, count = work.memory.checkpoint, work.memory.checkpoint_layers
    if checkpoint == "none" or (checkpoint == "budget" and count == 0):
        return 0
    kept = _linear_outputs(work) if checkpoint == "selective" else 0
    return layer_activations(work) - kept


def _linear_outputs(work: Workload) -> int:
    model, n, tp = work.model, work.tokens, work.tp
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tp
    inner = model.intermediate_size // tp * (2 if model.mlp == "swiglu" else 1)
    return n * (heads + inner + 2 * model.hidden_size // tp) * (2 if work.narrow else _WIDE)


def layers_to_recompute(work: Workload, budget: int) -> int:
    """Return the fewest layers whose recomputation brings the activations within a budget.

    Raises:
        ConfigError: Even recomputing all of them does not.
    """
    whole, entry = layer_activations(work), work.tokens // work.tp * work.model.hidden_size * _WIDE
    for count in range(work.layers + 1):
        kept = count * entry + (work.layers - count) * whole + (whole if count else 0)
        if kept <= budget:
            return count
    least = work.layers * entry + whole
    raise ConfigError(
        f"memory.budget_mb = {budget / 1e6:.0f}, but with every layer recomputed a micro-batch's "
        f"activations still take {least / 1e6:.0f} MB by the estimate",
        remedy="raise it, or lower batch.micro_batch_size",
    )


def estimate_memory(work: Workload) -> MemoryEstimate:
    """Estimate a rank's memory over one step of training, its first ones aside."""
    model = work.model
    matrices, vectors = layer_parameters(model, work.tp)
    root = root_parameters(model, work.tp)
    layer = matrices + vectors
    held = -(-(work.layers * layer + root) // work.shards)
    held_matrices = -(-work.layers * matrices // work.shards)
    parameters = gradients = held * _WIDE
    moments = 2 * work.state_bytes
    optimizer = int(held * moments)
    if work.muon:
        optimizer = int((held - held_matrices) * moments + held_matrices * _WIDE)
    if work.memory.offload_optimizer:
        parameters = gradients = optimizer = 0
    activations = kept_activations(work) + _batch_bytes(work)
    copies = work.layers * matrices * 2 if work.narrow and work.shards == 1 else 0
    gathered = _gathered_bytes(work, layer, root)
    saved, temporary = _loss_bytes(work)
    standing = parameters + optimizer + gathered
    standing += gradients if work.accumulates or work.keeps_buckets else 0
    standing += work.tree_lists * gradients
    scores = _score_bytes(work)
    head = model.vocab_size * model.hidden_size // work.tp * _WIDE
    at_loss = standing + activations + copies + saved + temporary
    into_backward = standing + activations + copies + head + scores + recomputed_activations(work)
    end = parameters + optimizer + gathered + (1 + work.tree_lists) * gradients
    end += max(head if model.tie_embeddings else 0, layer_activations(work) + scores)
    exchange = 2 * min(gradients, BUCKET_BYTES) if work.tree_lists else 0
    update = parameters + optimizer + gradients + max(exchange, _update_bytes(work, matrices))
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations + copies,
        loss=saved + temporary,
        gathered=gathered,
        peak=max(at_loss, into_backward, end, update),
    )


def _batch_bytes(work: Workload) -> int:
    """Attention's mask, the rotation, and the states before and after the last norm."""
    n, model = work.tokens, work.model
    mask = n * work.length * _WIDE if work.matmul_attention else 0
    rotation = n * model.head_dim * _WIDE if model.position == "rope" else 0
    return mask + rotation + 2 * n // work.tp * model.hidden_size * _WIDE


def _gathered_bytes(work: Workload, layer: int, root: int) -> int:
    """Whole weights on a sharded rank: the root's always, of layers two or (zero2) all."""
    if work.shards == 1:
        return 0
    size = 2 if work.narrow else _WIDE
    layers = min(2, work.layers) if work.zero3 else work.layers
    # The root's gradient is whole until the backward pass ends; a layer's while it is scattered.
    return root * 2 * _WIDE + layers * layer * size + 2 * layer * _WIDE


def _loss_bytes(work: Workload) -> tuple[int, int]:
    """Return what the loss keeps for its backward pass, and its largest temporaries."""
    model, n = work.model, work.tokens
    size = 2 if work.narrow else _WIDE
    vocabulary = model.vocab_size // work.tp
    head = vocabulary * model.hidden_size
    chunk = min(n, work.chunk_tokens) * vocabulary
    saved = n * model.hidden_size * _WIDE + head * _WIDE
    wide = chunk * (3 * _WIDE + (2 if work.narrow else 0))
    if n > work.chunk_tokens:
        wide += chunk * size  # the chunk before is let go only when the next is done
    product = head * size if work.narrow else 0  # the weight, narrowed
    return saved, product + max(wide, chunk * size + head * size)


def _score_bytes(work: Workload) -> int:
    """Temporaries of one layer's attention backward: scores and their gradients."""
    if not work.matmul_attention:
        return 0
    scores = work.tokens * work.length * work.model.num_heads // work.tp
    return scores * _WIDE * (4 if work.narrow else 3)


def _update_bytes(work: Workload, matrices: int) -> int:
    """Temporaries of Muon's update: every matrix's, and a stack of the largest kind of shape."""
    if not work.muon:
        return 0
    model = work.model
    mlp = model.hidden_size * model.intermediate_size * (3 if model.mlp == "swiglu" else 2)
    stack = work.layers * max(mlp, matrices * work.tp - mlp)
    return work.layers * matrices // work.shards * _WIDE + stack * (_WIDE + 3 * 2)


def check_fits(config: TrainConfig, model: ModelConfig, available: int | None) -> MemoryEstimate:
    """Refuse a run that can't fit.

    Args:
        config: Resolved.
        model: The architecture.
        available: Bytes that a rank may use; None where nobody knows.

    Returns:
        The estimate.

    Raises:
        ConfigError: Naming the largest part and what would shrink it.
    """
    estimate = estimate_memory(describe_workload(config, model))
    limit = config.memory.limit_mb
    if limit is not None:
        available = limit * 10**6
    if available is None or estimate.peak <= available or not config.memory.check:
        return estimate
    parts = {
        "activations": estimate.activations,
        "loss": estimate.loss,
        "optimizer": estimate.optimizer + estimate.parameters + estimate.gradients,
    }
    largest = max(parts, key=lambda name: parts[name])
    remedies = {
        "activations": "lower batch.micro_batch_size, or --set memory.checkpoint=full",
        "loss": "lower batch.loss_chunk_tokens",
        "optimizer": f"shard it: --set mesh.fsdp={2 * config.mesh.fsdp}, or train a smaller model",
    }
    names = {"optimizer": "weights, gradients and optimizer state"}
    raise ConfigError(
        f"a step takes {estimate.peak / 1e9:.2f} GB on a rank by the estimate, "
        f"{parts[largest] / 1e9:.2f} GB of it {names.get(largest, largest)}; "
        f"{available / 1e9:.2f} GB are available",
        remedy=f"{remedies[largest]}; memory.check=false tries nevertheless",
    )
