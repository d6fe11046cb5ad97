"""What a recipe may say: the model, the data, the batch, the optimizer and the budget.

A recipe may leave almost everything at "auto": `train.resolve` derives those values from the
`size` dial, the dataset and the machine, prints them, and writes the result as the run's
`config.yaml`. No torch here, so that help texts are quick.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from minigpt.core.config import Auto, Config
from minigpt.data.config import DataConfig
from minigpt.model.config import LoraConfig, RopeScaling

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


class ObjectiveConfig(Config):
    """What the run minimises."""

    kind: Literal["pretrain", "sft", "dpo", "distill"] = "pretrain"
    """pretrain: every next token, of texts. sft: the assistant's tokens alone, of conversations.
    dpo: the chosen answer over the rejected, of preferences. distill: a teacher's distribution,
    over texts or conversations."""
    beta: float = Field(default=0.1, gt=0)
    """dpo: how strongly the policy is held to the weights it starts from."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """dpo: the share of pairs thought to be labelled the wrong way round."""
    teacher: str | None = None
    """distill: a model artifact or Hugging Face directory with the student's tokenizer."""
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = "forward-kl"
    """distill: KL(teacher || student), KL(student || teacher), or Jensen-Shannon."""
    temperature: float = Field(default=1.0, gt=0)
    """distill: divides both models' logits in the divergence."""
    distill_weight: float = Field(default=0.5, gt=0, le=1)
    """distill: the divergence's weight; the rest is the text's own cross-entropy."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        users = {
            "dpo": ("beta", "label_smoothing"),
            "distill": ("teacher", "divergence", "temperature", "distill_weight"),
        }
        for kind, names in users.items():
            for name in names:
                value = getattr(self, name)
                if self.kind != kind and value != type(self).model_fields[name].default:
                    raise ValueError(
                        f"objective.{name} = {value} is for kind {kind}, not {self.kind}"
                    )
        if self.kind == "distill" and self.teacher is None:
            raise ValueError("objective.teacher is required for kind distill")
        return self


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


class TrainConfig(Config):
    """A training run. "auto" is derived and printed; every value can be given instead."""

    name: str = "run"
    """Name of the run and of the model it makes."""
    data: str | DataConfig
    """Path of a dataset artifact; or how to prepare one: DataConfig's keys, or the path of a YAML
    file of them, relative to the recipe."""
    size: int = Field(default=4, ge=1, le=128)
    """The one dial: layers. Width, heads, batch, learning rates and budget follow from it."""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products (weights stay float32); auto is bfloat16 where the hardware has it."""
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.initialize_from is None:
            for needs, name in (
                (self.objective.kind == "dpo", "objective.kind = dpo"),
                (self.lora.rank > 0, f"lora.rank = {self.lora.rank}"),
            ):
                if needs:
                    raise ValueError(f"{name} tunes given weights: set initialize_from")
        return self
