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
from minigpt.train.config import TrainConfig
from minigpt.train.tree import BUCKET_BYTES
from minigpt.train.workload import (
    Workload,
    adapter_parameters,
    describe_workload,
    inner_width,
    layer_parameters,
    projection_sizes,
    root_parameters,
)

_WIDE = 4  # bytes of float32
_LOGITS = {"pretrain": 3, "sft": 3, "dpo": 2, "distill": 8, "draft-heads": 8}
"""Tensors of a chunk's logits that exist at once."""
_JSD_LOGITS = 10
_HEAD_STATES = 14
"""Tensors as wide as the model that draft heads keep of a token, a depth."""


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
    frozen: int
    """DPO's reference or distillation's teacher, whole on each rank."""
    peak: int
    """The most at any moment of a step; less than the sum, since not all exist at once."""


def layer_activations(work: Workload) -> int:
    """Return the bytes that one layer's forward pass keeps, nothing recomputed."""
    model, n, tp = work.model, work.tokens, work.tp
    size = 2 if work.narrow else _WIDE
    kept = n // tp * model.hidden_size * _WIDE  # input of the second norm
    # On a CPU, RMSNorm is not fused and keeps the normalised input too where its weight learns,
    # all in float32.
    if model.norm == "rmsnorm" and not work.fused_norm and work.trains_all:
        kept += 2 * n // tp * model.hidden_size * _WIDE
    if work.lora.dropout:
        kept += n * _adapter_inputs(work) * (_WIDE + size)  # the mask, and what it leaves
    kept += n * work.lora.rank * work.learns(*projection_sizes(model)) * size
    return kept + _entry(work) + _attention_activations(work) + _mlp_activations(work)


def _attention_activations(work: Workload) -> int:
    """Return what attention and its projections keep, the layer's input not."""
    model, n, tp = work.model, work.tokens, work.tp
    size = 2 if work.narrow else _WIDE
    queries, keys = (
        heads * model.head_dim // tp for heads in (model.num_heads, model.num_kv_heads)
    )
    # Autocast makes a narrow copy of a norm's output for each projection that reads it.
    readers = work.keeps_inputs("q_proj", "k_proj", "v_proj")
    kept = n * model.hidden_size * (2 * readers if work.narrow else _WIDE * (readers > 0))
    if model.qk_norm:
        wide = 2 * _WIDE if work.trains_all else _WIDE
        kept += n * (queries + keys) * (size if work.fused_norm else wide)
    grouped = model.num_kv_heads < model.num_heads and work.matmul_attention
    gathered = work.row_length // work.length  # of keys and values, by context parallel ranks
    kept += n * (queries + 2 * (queries if grouped else keys * gathered)) * size
    kept += n * queries * size  # attention's output
    if work.matmul_attention or gathered > 1:
        kept += n * queries * size * work.keeps_inputs("o_proj")  # a copy, heads side by side
    if work.matmul_attention:
        kept += n * work.length * (model.num_heads // tp) * size
    else:
        # torch's kernels turn a mask into a sum's term, anew in each layer. Of two pieces of a
        # row, context parallel ranks see at most (T / 2 cp) x (1 + 1 / 2 cp) T.
        kept += n * work.row_length * size * (gathered + 1) // (2 * gathered)
    return kept


def _mlp_activations(work: Workload) -> int:
    """Return what the MLP keeps, its input included; of experts those of all chosen ones."""
    model, size, n = work.model, 2 if work.narrow else _WIDE, work.tokens
    gated, width = model.mlp == "swiglu", model.hidden_size
    inner = inner_width(model)
    experts, readers = model.num_experts, work.keeps_inputs("up_proj", *["gate_proj"] * gated)
    kept = 0
    if experts:
        # The router's input and probabilities; the experts' outputs, weighted.
        kept += n // work.tp * (width * _WIDE + 2 * experts * _WIDE)
        n = n // work.tp * model.experts_per_token
        kept += n * width * size
    else:
        inner //= work.tp
    kept += n * width * (2 * readers if work.narrow else _WIDE * (readers > 0))
    return kept + n * inner * ((3 if gated else 1) + work.keeps_inputs("down_proj")) * size


def _mlp_gradients(work: Workload) -> int:
    """Temporaries of an MLP's backward pass: gradients of the two factors of its product."""
    chosen = work.model.experts_per_token if work.model.num_experts else 1
    inner = inner_width(work.model) * work.tokens * chosen // work.tp
    return 2 * inner * (2 if work.narrow else _WIDE)


def _adapter_inputs(work: Workload) -> int:
    sizes = projection_sizes(work.model)
    return sum(sizes[name][0] for name in work.lora.targets if name in sizes)


def _entry(work: Workload) -> int:
    """Return the bytes of a layer's input, which recomputation begins with."""
    return work.tokens // work.tp * work.model.hidden_size * _WIDE


def kept_activations(work: Workload) -> int:
    """Return the bytes that all layers keep under the chosen recomputation."""
    whole, entry = layer_activations(work), _entry(work)
    if work.memory.offload_activations:
        return 2 * whole  # one layer's on their way out, one's on their way in
    if work.memory.checkpoint == "selective":
        return work.layers * (entry + _linear_outputs(work))
    recomputed = work.recomputed_layers
    kept = recomputed * entry + (work.layers - recomputed) * whole
    if recomputed or work.trains_all or not work.is_first:
        return kept
    # Before the first adapter there is nothing to differentiate.
    before = work.learns("q_proj", "k_proj", "v_proj") == 0
    return kept - entry - before * _attention_activations(work)


def recomputed_activations(work: Workload) -> int:
    """Return the bytes that come into being again as the backward pass enters the last layer."""
    if work.recomputed_layers < work.layers:
        return 0  # those before it come when its own are gone
    kept = _linear_outputs(work) if work.memory.checkpoint == "selective" else 0
    return layer_activations(work) - kept - _entry(work)


def _linear_outputs(work: Workload) -> int:
    model, n, tp = work.model, work.tokens, work.tp
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tp
    inner = inner_width(model) // tp * (2 if model.mlp == "swiglu" else 1)
    return n * (heads + inner + 2 * model.hidden_size // tp) * (2 if work.narrow else _WIDE)


def layers_to_recompute(work: Workload, budget: int) -> int:
    """Return the fewest layers whose recomputation brings the activations within a budget.

    Raises:
        ConfigError: Even recomputing all of them does not.
    """
    whole, entry = layer_activations(work), _entry(work)
    for count in range(work.layers + 1):
        kept = count * entry + (work.layers - count) * whole
        kept += whole if count == work.layers else 0
        if kept <= budget:
            return count
    least = work.layers * entry + whole
    raise ConfigError(
        f"memory.budget_mb = {budget / 1e6:.0f}, but with every layer recomputed a micro-batch's "
        f"activations still take {least / 1e6:.0f} MB by the estimate",
        remedy="raise it, or lower batch.micro_batch_size",
    )


def estimate_memory(
    config: TrainConfig, model: ModelConfig, teacher: ModelConfig | None = None
) -> MemoryEstimate:
    """Estimate the memory, over one step, of the rank that needs most.

    Args:
        config: Resolved.
        model: The architecture that is trained.
        teacher: Distillation's.
    """
    stages = (describe_workload(config, model, teacher, stage) for stage in range(config.mesh.pp))
    return max((estimate_rank(work) for work in stages), key=lambda found: found.peak)


def estimate_rank(work: Workload) -> MemoryEstimate:
    """Estimate a rank's memory over one step of training, its first ones aside."""
    model = work.model
    matrices, vectors = layer_parameters(model, work.tp, work.ep)
    adapters = adapter_parameters(model, work.lora, work.ep)
    root = root_parameters(model, work.tp, is_first=work.is_first, is_last=work.is_last)
    layer = matrices + vectors
    held = -(-(work.layers * (layer + adapters) + root) // work.shards) + work.heads
    learning = held if work.trains_all else -(-work.layers * adapters // work.shards) + work.heads
    held_matrices = -(-work.layers * matrices // work.shards)
    parameters, gradients = held * _WIDE, learning * _WIDE
    moments = 2 * work.state_bytes
    optimizer = int(learning * moments)
    if work.muon:
        optimizer = int((held - held_matrices) * moments + held_matrices * _WIDE)
    if work.memory.offload_optimizer:
        parameters = gradients = optimizer = 0
    frozen = 0 if work.frozen is None else work.frozen.parameter_counts().total * _WIDE
    activations = kept_activations(work) * work.live_layers // work.layers
    activations += work.live_passes * _batch_bytes(work)
    activations += work.waiting_layers * _linear_outputs(work)
    kept_layers = work.layers - work.recomputed_layers
    copies = kept_layers * (matrices + adapters) * 2 if work.narrow and work.shards == 1 else 0
    shards, gathered = _gathered_bytes(work, layer + adapters, root)
    layer_gradient = (layer if work.trains_all else adapters) * _WIDE if work.shards > 1 else 0
    saved, temporary = _loss_bytes(work)
    head = model.vocab_size * model.hidden_size // work.tp * _WIDE
    head_gradient = head if work.is_last and work.trains_all else 0
    standing = parameters + optimizer + frozen
    kept_gradients = gradients * (work.accumulates + work.keeps_buckets + work.tree_lists)
    scores = _score_bytes(work)
    busy = standing + kept_gradients + activations + copies
    at_loss = busy + shards + saved + temporary
    # Of the last norm a gradient alone is left. First comes the last layer's MLP, whose
    # activations are gone by the time of its attention.
    into_backward = busy + gathered + head_gradient + recomputed_activations(work) - _entry(work)
    into_backward += max(layer_gradient, _mlp_gradients(work), scores - _mlp_activations(work))
    end = standing + gathered + (1 + work.tree_lists) * gradients
    end += root * _WIDE if work.shards > 1 and work.trains_all else 0  # whole till it is scattered
    end += activations * (work.live_passes - 1) // work.live_passes  # of other micro-batches
    looked_up = head if work.trains_all and model.tie_embeddings and work.is_first else 0
    end += max(looked_up, layer_activations(work) + scores)
    exchange = 2 * min(gradients, BUCKET_BYTES) if work.tree_lists else 0
    update = parameters + optimizer + gradients + frozen
    update += max(exchange, _update_bytes(work, matrices))
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        frozen=frozen,
        activations=activations + copies,
        loss=saved + temporary,
        gathered=gathered + layer_gradient,
        peak=max(at_loss, into_backward, end, update),
    )


def _batch_bytes(work: Workload) -> int:
    """Attention's mask, the rotation, and the states before and after the last norm."""
    n, model = work.tokens, work.model
    mask = n * work.row_length * (_WIDE if work.matmul_attention else 1)
    rotation = n * model.head_dim * _WIDE if model.position == "rope" else 0
    states = 2 if work.is_last else 1  # a stage's output waits for its gradient
    return mask + rotation + states * n // work.tp * model.hidden_size * _WIDE


def _gathered_bytes(work: Workload, layer: int, root: int) -> tuple[int, int]:
    """Return a sharded rank's whole weights at the loss, and in the backward pass.

    The root's always, of layers none and then two (zero3), or all.
    """
    if work.shards == 1:
        return 0, 0
    size = 2 if work.narrow else _WIDE
    at_loss, later = (0, min(2, work.layers)) if work.zero3 else (work.layers, work.layers)
    return root * _WIDE + at_loss * layer * size, root * _WIDE + later * layer * size


def _loss_bytes(work: Workload) -> tuple[int, int]:
    """Return what the loss keeps for its backward pass, and its largest temporaries."""
    if not work.is_last:
        return 0, 0
    model, n = work.model, work.tokens
    size = 2 if work.narrow else _WIDE
    vocabulary = model.vocab_size // work.tp
    head = vocabulary * model.hidden_size
    first = min(n, work.chunk_tokens) * vocabulary
    # The chunk before is let go only when the next, perhaps a shorter one, is done.
    second = min(max(0, n - work.chunk_tokens), work.chunk_tokens) * vocabulary
    saved = n * model.hidden_size * _WIDE + (head * _WIDE if work.trains_all else 0)
    if work.tp > 1:
        saved += n * model.hidden_size * _WIDE  # states of the whole sequence, gathered
    kind = work.objective.kind
    logits = _JSD_LOGITS if work.objective.divergence == "jsd" else _LOGITS[kind]
    element = logits * _WIDE + (2 if work.narrow else 0)
    product = head * size if work.narrow else 0  # the weight, narrowed
    if kind == "draft-heads":
        saved += work.objective.depth * n * model.hidden_size * _HEAD_STATES * _WIDE
    if kind == "distill":
        assert work.frozen is not None
        saved += n * work.frozen.hidden_size * _WIDE  # the teacher's states
        if work.narrow:  # its head and logits too have a narrow copy
            element += 2
            product += vocabulary * work.frozen.hidden_size * 2
    wide = max(first * element, second * element + first * size)
    learned = first * size + (head * size if work.trains_all else 0)
    return saved, product + max(wide, learned)


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
    mlp = model.hidden_size * inner_width(model) * (3 if model.mlp == "swiglu" else 2)
    mlp *= max(1, model.num_experts // work.ep)
    stack = work.layers * max(mlp, matrices * work.tp - mlp)
    moved = work.layers * matrices // work.shards * _WIDE
    if work.shards == work.tp == 1:
        return moved + stack * (_WIDE + 3 * 2)
    return moved + work.layers * matrices * work.tp * 2 + stack * 4 * 2  # whole, in two bytes


def check_fits(
    config: TrainConfig,
    model: ModelConfig,
    available: int | None,
    teacher: ModelConfig | None = None,
) -> MemoryEstimate:
    """Refuse a run that can't fit.

    Args:
        config: Resolved.
        model: The architecture.
        available: Bytes that a rank may use; None where nobody knows.
        teacher: Distillation's.

    Returns:
        The estimate.

    Raises:
        ConfigError: Naming the largest part and what would shrink it.
    """
    estimate = estimate_memory(config, model, teacher)
    limit = config.memory.limit_mb
    if limit is not None:
        available = limit * 10**6
    if available is None or estimate.peak <= available or not config.memory.check:
        return estimate
    parts = {
        "activations": estimate.activations,
        "loss": estimate.loss,
        "weights, gradients and optimizer state": (
            estimate.optimizer + estimate.parameters + estimate.gradients
        ),
        "the frozen model": estimate.frozen,
    }
    remedies = {
        "activations": "lower batch.micro_batch_size, or --set memory.checkpoint=full",
        "loss": "lower batch.loss_chunk_tokens",
        "weights, gradients and optimizer state": (
            f"shard it: --set mesh.fsdp={2 * config.mesh.fsdp}, or train a smaller model"
        ),
        "the frozen model": (
            "set objective.teacher to a smaller one"
            if teacher is not None
            else "--set lora.rank=16: the reference is then the model itself, adapters off"
        ),
    }
    largest = max(parts, key=lambda name: parts[name])
    raise ConfigError(
        f"a step takes {estimate.peak / 1e9:.2f} GB on a rank by the estimate, "
        f"{parts[largest] / 1e9:.2f} GB of it {largest}; {available / 1e9:.2f} GB are available",
        remedy=f"{remedies[largest]}; memory.check=false tries nevertheless",
    )
