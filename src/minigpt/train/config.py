"""What a recipe may say: the model, the data, the batch, the optimizer and the budget.

A recipe may leave almost everything at "auto": `train.resolve` derives those values from the
`size` dial, the dataset and the machine, prints them, and writes the result as the run's
`config.yaml`. No torch here, so that help texts are quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from minigpt.core.config import Auto, Config, from_mapping
from minigpt.data.config import DataConfig, MixtureConfig, Packing
from minigpt.data.skip_list import SkipList
from minigpt.model.config import LoraConfig, RopeScaling
from minigpt.train.objective_config import ObjectiveConfig, check_tuning

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]


class ModelOverrides(Config):
    """ModelConfig's fields; "auto" is derived from `size`."""

    vocab_size: Count | Auto = "auto"
    """Tokens in the vocabulary; auto is the dataset's tokenizer's."""
    num_layers: Count | Auto = "auto"
    """Transformer blocks; auto is `size`."""
    hidden_size: Count | Auto = "auto"
    """Width of the residual stream; auto is 64 times `size`."""
    num_heads: Count | Auto = "auto"
    """Query heads; auto is hidden_size / head_dim."""
    num_kv_heads: Count | Auto = "auto"
    """Key and value heads; auto is num_heads."""
    head_dim: Count | Auto = "auto"
    """Width of a head; auto is 64, or less in a narrow model."""
    intermediate_size: Count | Auto = "auto"
    """Width inside the MLP; auto is 8/3 of hidden_size (SwiGLU) or 4 times it (GELU)."""
    context_length: Count | Auto = "auto"
    """Most tokens in a sequence; auto is batch.sequence_length."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and at the end."""
    norm_eps: float = 1e-6
    """Added to the variance."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary embeddings in attention, or a learned table added to the input."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are stretched, if at all."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Gated SiLU, or GELU (tanh form, as GPT-2)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases on the MLP's projections."""
    qk_norm: bool = True
    """RMSNorm on each query and key head before the rotation."""
    tie_embeddings: bool = True
    """Share the token embedding with the output projection."""
    sliding_window: int | None = None
    """A token sees this many latest tokens, itself included; null is all."""
    num_experts: CountOrZero = 0
    """MLPs in each layer, of which a token takes a few; 0 is one MLP for all."""
    experts_per_token: Count = 2
    """Experts that each token goes through."""
    expert_intermediate_size: Count | None = None
    """Width inside an expert; null is intermediate_size."""
    norm_topk_prob: bool = True
    """Scale the weights of a token's experts to a sum of 1."""
    router_bias: bool = True
    """Steer the choice of experts by a bias that evens out their load."""


class BatchConfig(Config):
    """How many tokens one step sees, and how they are cut up."""

    sequence_length: Count | Auto = "auto"
    """Tokens in a row; auto grows with `size` from 256 to 2,048."""
    tokens_per_step: Count | Auto = "auto"
    """Tokens in a global batch, over all its micro-batches; auto grows with the token budget."""
    micro_batch_size: Count | Auto = "auto"
    """Rows per forward and backward pass; the rest of a global batch is accumulated."""
    loss_chunk_tokens: Count | Auto = "auto"
    """Tokens whose logits exist at once; auto keeps a chunk's logits near 64 MB."""
    packing: Packing = "windows"
    """windows: rows are cut from the stream wherever they fall. best-fit: rows are made up of
    whole documents, only those longer than a row are split."""


class OptimizerConfig(Config):
    """Muon for hidden matrices with AdamW for the rest, or AdamW for all."""

    kind: Literal["muon", "adamw"] = "muon"
    """muon: hidden matrices by Muon, embeddings, head, norms and biases by AdamW."""
    lr: Rate | Auto = "auto"
    """Peak learning rate of AdamW."""
    muon_lr: Rate | Auto = "auto"
    """Peak learning rate of Muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-10, gt=0)
    """AdamW's term in the denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; embeddings, norms and biases are not decayed."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum (Nesterov)."""
    state_bits: Literal[8, 32] = 32
    """Of AdamW's two moments: 8 keeps them as block-wise quantized bytes, by torchao."""
    router_bias_rate: float = Field(default=0.001, ge=0)
    """By how much a step moves an expert's bias towards an even load, in units of probability."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; null never clips."""


class ScheduleConfig(Config):
    """The learning rate over the steps, as a factor of its peak."""

    kind: Literal["cosine", "wsd"] = "wsd"
    """cosine; or wsd: warmup, stable, linear decay."""
    warmup_steps: CountOrZero | Auto = "auto"
    """Steps of linear warmup; auto is 2 % of the steps, at most 200."""
    decay_fraction: float = Field(default=0.4, ge=0, le=1)
    """wsd: share of the steps, at the end, over which the rate falls."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """The last step's share of the peak."""


class ValidationConfig(Config):
    """In-loop validation on the held-out split."""

    every: CountOrZero | Auto = "auto"
    """Steps between validations; 0 only at the end; auto is a tenth of the steps."""
    tokens: int = Field(default=65_536, ge=1)
    """Most validation tokens to score, whole documents drawn by `seed`."""
    sample_tokens: int = Field(default=48, ge=0)
    """Length of the sample printed at each validation; 0 prints none."""
    sample_prompt: str = ""
    """Text that the sample continues."""


class CheckpointConfig(Config):
    """When the whole state is saved and which saves are kept."""

    every: CountOrZero | Auto = "auto"
    """Steps between saves; 0 only at the end; auto is that of the validation."""
    keep: int = Field(default=2, ge=1)
    """Latest checkpoints to keep; the best one by validation is kept besides."""
    keep_every: CountOrZero = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none so."""
    background: bool = True
    """Write while training goes on; false waits for the end of each save."""
    url: str = ""
    """Where checkpoints go: a directory or a URL such as s3://bucket/run; empty is
    `<run-dir>/checkpoints`."""


class TrackersConfig(Config):
    """Where metrics go besides metrics.jsonl; no tracker can slow or stop a step."""

    mlflow: bool = True
    """Log to MLflow."""
    mlflow_uri: str = ""
    """MLflow tracking server; empty is the SQLite file `mlflow.db` in minigpt's home."""
    experiment: str = ""
    """MLflow experiment or W&B project; empty is minigpt."""
    tensorboard: bool = False
    """Write TensorBoard event files to `<run-dir>/tensorboard`."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_mode: Literal["online", "offline"] = "offline"
    """offline writes below `<run-dir>/wandb`, for `wandb sync`."""


class RecoveryConfig(Config):
    """What is noticed by itself, what is done about it, and when a person is called."""

    supervise: bool = False
    """Restart a run of one process too from its last good checkpoint; several always are."""
    restarts_per_hour: CountOrZero = 6
    """Automatic restarts within an hour; one more failure ends the run."""
    backoff_seconds: float = Field(default=1.0, ge=0)
    """Pause before a restart; doubles, up to 60 s, while no checkpoint is made in between."""
    grace_seconds: float | None = Field(default=None, gt=0)
    """Time from SIGTERM to the kill. Given, a save is timed after the first step, and a run whose
    save takes longer is refused; null counts on 30 s."""
    on_anomaly: Literal["recover", "stop"] = "recover"
    """A loss or gradient that is not finite, or a spike. recover: compute the step again, then
    skip it, then roll back and skip its data; stop: end the run at the first not finite."""
    spike_sigmas: float | None = Field(default=12.0, gt=0)
    """A spike lies this many robust standard deviations above the median; null looks for none."""
    spike_window: int = Field(default=64, ge=8)
    """Steps over which median and deviation are taken; the first so many are never spikes."""
    max_skips: CountOrZero = 3
    """Steps in a row that may be skipped before the run is rolled back."""
    max_rollbacks: CountOrZero = 2
    """Rollbacks in a run; one more ends it."""
    check_every: CountOrZero = 100
    """Steps between comparisons of the replicas' weights and of the ranks' speeds; 0 never."""
    straggler_ratio: float = Field(default=1.5, gt=1)
    """A rank is slow when it computes this many times longer than the median of the others."""
    hang_seconds: float = Field(default=300.0, gt=0)
    """Least time without progress of any rank that counts as a hang."""
    hang_factor: float = Field(default=10.0, ge=1)
    """A hang also takes this many times the longest that the same phase has taken before."""
    start_seconds: float = Field(default=1800.0, gt=0)
    """Most time from a process's start, or from its restore, to its first step."""
    adapt_interval: bool = False
    """Save by Young's and Daly's interval, from the measured save time and failure rate, besides
    `checkpoint.every`."""
    price_per_device_hour: float | None = Field(default=None, ge=0)
    """Price of one device for an hour, for the cost lines of `minigpt train goodput`."""


class MeshConfig(Config):
    """How many processes a run spreads over, along which axes; the product is the world size."""

    pp: Count = 1
    """Pipeline parallel: groups of layers on different ranks."""
    dp: Count = 1
    """Data parallel with whole replicas; together with fsdp, sharded within and replicated
    between (hybrid sharding)."""
    fsdp: Count = 1
    """Data parallel with parameters, gradients and optimizer state sharded (FSDP2)."""
    ep: Count = 1
    """Expert parallel: experts on different ranks, each with data of its own."""
    cp: Count = 1
    """Context parallel: parts of each row on different ranks."""
    tp: Count = 1
    """Tensor parallel: parts of each matrix on different ranks, with sequence parallelism and the
    loss computed over a sharded vocabulary."""
    reshard: Literal["zero3", "zero2"] = "zero3"
    """fsdp: zero3 frees a layer's gathered weights after its forward pass and gathers them again;
    zero2 keeps them until the backward pass has used them."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """pp: the order of forward and backward passes."""
    virtual_stages: Count = 1
    """pp: groups of layers on each rank; more than one needs interleaved or zero-bubble."""
    reduce: Literal["ring", "tree"] = "ring"
    """dp: how gradients are added up. ring is the backend's all-reduce, overlapped with the
    backward pass; tree adds in an order that does not depend on the number of ranks, so that 1, 2
    and 4 give the same bits."""
    compress: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    """dp with ring: gradients are compressed on their way. Changes the result."""

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.pp * self.tp * self.cp * self.data_size

    @property
    def data_size(self) -> int:
        """Ranks that see different micro-batches."""
        return self.dp * self.fsdp * self.ep

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.virtual_stages > 1 and self.schedule in ("gpipe", "1f1b"):
            raise ValueError(
                f"mesh.virtual_stages = {self.virtual_stages} with mesh.schedule = "
                f"{self.schedule}: several stages a rank need interleaved or zero-bubble"
            )
        others = {name: getattr(self, name) for name in ("pp", "fsdp", "ep", "cp", "tp")}
        used = [f"mesh.{name} = {size}" for name, size in others.items() if size > 1]
        if self.reduce == "tree" and used:
            raise ValueError(
                f"mesh.reduce = tree with {', '.join(used)}: only data parallel (mesh.dp) sums in "
                "an order that is free of the number of ranks"
            )
        if self.reduce == "tree" and self.dp & (self.dp - 1):
            raise ValueError(f"mesh.reduce = tree with mesh.dp = {self.dp}: not a power of two")
        if self.compress != "none" and (self.reduce == "tree" or used or self.dp == 1):
            raise ValueError(
                f"mesh.compress = {self.compress} needs mesh.dp > 1 alone and mesh.reduce = ring: "
                "torch compresses in its data parallel wrapper"
            )
        return self


class MemoryConfig(Config):
    """What is kept in the device's memory, and what is computed again or kept elsewhere."""

    checkpoint: Literal["none", "full", "selective", "budget"] = "none"
    """Activation checkpointing: full computes each layer's forward pass again in the backward
    pass; selective all but its matrix products; budget as many layers as `budget_mb` asks for."""
    budget_mb: Count | None = None
    """With checkpoint = budget: megabytes that a micro-batch's activations may take on a rank."""
    checkpoint_layers: CountOrZero | None = None
    """With checkpoint = budget: layers computed again, from the first; null follows from
    budget_mb by the estimate."""
    offload_activations: bool = False
    """Keep activations in the CPU's memory between forward and backward pass; cuda only."""
    offload_optimizer: bool = False
    """With mesh.fsdp: keep weights' shards and optimizer state in the CPU's memory and update them
    there; cuda only."""
    limit_mb: Count | None = None
    """Megabytes a rank may use by the estimate before the start; null is what the device has."""
    check: bool = True
    """Refuse a run that can't fit by the estimate; false only warns."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.budget_mb is not None or self.checkpoint_layers is not None
        if self.checkpoint == "budget" and not given:
            raise ValueError("memory.checkpoint = budget needs memory.budget_mb")
        if self.checkpoint != "budget" and given:
            raise ValueError(
                f"memory.budget_mb and checkpoint_layers are for memory.checkpoint = budget, not "
                f"{self.checkpoint}"
            )
        return self


class TrainConfig(Config):
    """A training run. "auto" is derived and printed; every value can be given instead."""

    name: str = "run"
    """Name of the run and of the model it makes."""
    data: str | DataConfig | MixtureConfig
    """Path or URL of a dataset artifact; or how to prepare one: DataConfig's keys, or the path of
    a YAML file of them, relative to the recipe; or a `mixture` of datasets, likewise."""
    skip_list: str | SkipList | None = None
    """Documents and samples never to train on: path of a skip list, relative to the recipe, which
    is copied into the run."""
    size: Annotated[int, Field(ge=1, le=128)] | Auto = "auto"
    """The one dial: layers. Width, heads, batch, learning rates and budget follow from it; auto
    is the largest that `minutes` or `max_tokens` trains well on this machine, 4 without them."""
    model: ModelOverrides = ModelOverrides()
    """The architecture, where it is not to follow from `size`."""
    initialize_from: str | None = None
    """Start from these weights (model artifact or Hugging Face directory), not from random."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the run minimises."""
    lora: LoraConfig = LoraConfig()
    """Adapters to train in place of all weights."""
    steps: Count | Auto = "auto"
    """Optimizer updates; auto follows from max_tokens, minutes or `size`, the first given."""
    max_tokens: Count | None = None
    """With steps = auto: train on about this many tokens."""
    minutes: float | None = Field(default=None, gt=0)
    """With steps = auto: as many steps as fit, by a measurement at the start of the run."""
    batch: BatchConfig = BatchConfig()
    """Sequence length, global batch, micro-batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Muon or AdamW, and their rates."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the steps."""
    mesh: MeshConfig = MeshConfig()
    """The processes of the run, as `mesh: {dp: 2, tp: 2}`."""
    memory: MemoryConfig = MemoryConfig()
    """Activation checkpointing, offload, and the check that the run fits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float16", "float8"] = "auto"
    """Of matrix products (weights stay float32); auto is bfloat16 where the hardware has it.
    float16 scales the loss and needs a GPU; float8 a GPU of the Hopper generation, and torchao."""
    compile: bool | Auto = "auto"
    """Use torch.compile; auto does for runs long enough to win back its 20-60 s."""
    threads: Count | Auto = "auto"
    """CPU threads. They decide the bits of the result, so a resumed run uses the same number."""
    seed: int = Field(default=0, ge=0)
    """Decides the initial weights and the order of the data."""
    validation: ValidationConfig = ValidationConfig()
    """In-loop validation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    trackers: TrackersConfig = TrackersConfig()
    """MLflow, TensorBoard, W&B."""
    recovery: RecoveryConfig = RecoveryConfig()
    """Detection of failures and recovery from them."""

    @property
    def trains_all(self) -> bool:
        """Whether the model's weights learn, not adapters or heads beside them."""
        return not self.lora.rank and self.objective.kind != "draft-heads"

    @field_validator("data", mode="before")
    @classmethod
    def _choose_mixture(cls, value: Any) -> Any:
        """Read a mixture as one, so that its mistakes are not reported as another's."""
        if isinstance(value, Mapping) and "mixture" in value:
            return from_mapping(MixtureConfig, value, origin="data")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_tuning(self)
        return self
