"""From a recipe's objective to its parts, and which data and models it can work with."""

from __future__ import annotations

import copy

from minigpt.core.errors import ConfigError, ModelError
from minigpt.data.config import Content
from minigpt.data.tokenizer import TOKENIZER_FILE, Tokenizer
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.weights import LoadedModel
from minigpt.train.config import TrainConfig
from minigpt.train.distillation import DistillationObjective
from minigpt.train.draft_heads import DraftHeadsObjective
from minigpt.train.objective import NextToken, Objective
from minigpt.train.passes import keep_experts_uncompiled
from minigpt.train.preference import AdaptersOff, FrozenCopy, PreferenceObjective

_CONTENTS: dict[str, tuple[Content, ...]] = {
    "pretrain": ("text",),
    "sft": ("chat",),
    "dpo": ("preference",),
    "distill": ("text", "chat"),
    "draft-heads": ("text", "chat"),
}


def check_content(kind: str, content: Content, uri: str) -> None:
    """Refuse a dataset that is not the objective's.

    Raises:
        ConfigError: Naming the objective that is.
    """
    if content not in _CONTENTS[kind]:
        fitting = [name for name, contents in _CONTENTS.items() if content in contents]
        raise ConfigError(
            f"objective.kind = {kind} needs a dataset of {' or '.join(_CONTENTS[kind])}, but {uri} "
            f"is one of {content}",
            remedy=f"set objective.kind to {' or '.join(fitting)}, or use another dataset",
        )


def check_tokenizer(loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    """Refuse a model whose tokenizer gives other ids than the dataset's.

    Equal sizes would hide that: the losses would be finite and meaningless.

    Raises:
        ModelError: The tokenizers differ. A model without one is taken at its word.
    """
    if not (loaded.path / TOKENIZER_FILE).is_file():
        return
    if Tokenizer.load(loaded.path).fingerprint != tokenizer.fingerprint:
        raise ModelError(
            f"the tokenizer of {loaded.path} is not the dataset's: equal ids mean other text",
            remedy="prepare the dataset with tokenizer.kind=file and this model as tokenizer.path",
        )


def make_objective(
    config: TrainConfig,
    model_config: ModelConfig,
    initial: LoadedModel | None,
    teacher: LoadedModel | None,
) -> Objective:
    """Make what a step minimises; the frozen models are put on the run's device.

    Args:
        config: Resolved.
        model_config: The trained model's.
        initial: The weights it starts from, which are DPO's reference.
        teacher: Distillation's.

    Raises:
        ModelError: The teacher's output has another width than the student's.
    """
    chosen = config.objective
    if chosen.kind == "dpo":
        assert initial is not None
        reference = AdaptersOff() if config.lora.rank else FrozenCopy(_copy(initial, config))
        return PreferenceObjective(
            reference, beta=chosen.beta, label_smoothing=chosen.label_smoothing
        )
    if chosen.kind == "distill":
        assert teacher is not None
        if teacher.config.vocab_size != model_config.vocab_size:
            raise ModelError(
                f"the teacher has {teacher.config.vocab_size} output rows, the student "
                f"{model_config.vocab_size}: their distributions can't be compared",
                remedy="set model.vocab_size to the teacher's",
            )
        return DistillationObjective(
            _copy(teacher, config),
            divergence=chosen.divergence,
            temperature=chosen.temperature,
            weight=chosen.distill_weight,
        )
    if chosen.kind == "draft-heads":
        return DraftHeadsObjective(chosen.depth)
    return NextToken()


def _copy(loaded: LoadedModel, config: TrainConfig) -> Decoder:
    """Return a loaded model with tensors of its own: mapped ones would change the bits."""
    copied = copy.deepcopy(loaded.model).to(config.device)
    if config.compile is True:
        keep_experts_uncompiled(copied)
    return copied
