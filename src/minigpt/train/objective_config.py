"""What a run minimises, as a recipe says it, and what can't go together with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from minigpt.core.config import Config

if TYPE_CHECKING:
    from minigpt.train.config import TrainConfig


class ObjectiveConfig(Config):
    """What the run minimises."""

    kind: Literal["pretrain", "sft", "dpo", "distill", "draft-heads"] = "pretrain"
    """pretrain: every next token, of texts. sft: the assistant's tokens alone, of conversations.
    dpo: the chosen answer over the rejected, of preferences. distill: a teacher's distribution,
    over texts or conversations. draft-heads: what the model itself will say further ahead, by
    heads for speculative decoding; the model is frozen."""
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

    depth: int = Field(default=3, ge=1, le=16)
    """draft-heads: how many tokens ahead they learn to guess."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        users = {
            "dpo": ("beta", "label_smoothing"),
            "distill": ("teacher", "divergence", "temperature", "distill_weight"),
            "draft-heads": ("depth",),
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


def check_tuning(config: TrainConfig) -> None:
    """Refuse an objective or adapters with settings that they can't go with.

    Raises:
        ValueError: Naming both.
    """
    kind, lora = config.objective.kind, config.lora
    if config.initialize_from is None:
        for needs, name in (
            (kind in ("dpo", "draft-heads"), f"objective.kind = {kind}"),
            (lora.rank > 0, f"lora.rank = {lora.rank}"),
        ):
            if needs:
                raise ValueError(f"{name} tunes given weights: set initialize_from")
    if kind in ("dpo", "distill") and config.mesh.pp > 1:
        raise ValueError(
            f"objective.kind = {kind} with mesh.pp = {config.mesh.pp}: its second model would have "
            "to pass through the pipeline as well; use another axis of the mesh"
        )
    if kind == "draft-heads":
        for wrong, name in (
            (lora.rank > 0, f"lora.rank = {lora.rank}"),
            (config.mesh.size > 1, f"a mesh of {config.mesh.size} processes"),
            (config.precision == "float8", "precision = float8"),
        ):
            if wrong:
                raise ValueError(f"objective.kind = draft-heads with {name}: leave it out")
    if not lora.rank:
        return
    if lora.dropout and config.mesh.tp > 1:
        raise ValueError(
            f"lora.dropout = {lora.dropout} with mesh.tp = {config.mesh.tp}: ranks that share a "
            "projection would drop different inputs; set lora.dropout to 0"
        )
    if config.precision == "float8":
        raise ValueError(
            f"lora.rank = {lora.rank} with precision = float8: the frozen weights would be "
            "rounded anew in each step for nothing; use bfloat16"
        )
    if lora.dropout and config.memory.checkpoint != "none":
        raise ValueError(
            f"lora.dropout = {lora.dropout} with memory.checkpoint = {config.memory.checkpoint}: "
            "what is computed again would drop other inputs; set one of them to its default"
        )
