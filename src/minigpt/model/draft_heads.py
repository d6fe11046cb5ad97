"""Draft heads: a small recurrent module by which a model guesses its own next tokens.

From the model's last hidden state and the token chosen there it makes the state that the model
would have at that token, nearly; the model's own output projection says which token that predicts,
and so on, a token at a time. It has no attention, so no KV cache. (Hydra's sequential heads,
https://arxiv.org/abs/2402.05109, with one set of weights for all depths and a shared output
projection, as multi-token prediction has it, https://arxiv.org/abs/2412.19437.)
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from minigpt.core.artifact import open_artifact
from minigpt.core.config import Config, from_mapping
from minigpt.core.errors import ConfigError, ModelError
from minigpt.core.storage import storage_errors
from minigpt.model.config import ModelConfig
from minigpt.model.layers import RMSNorm
from minigpt.model.tensor_files import read_tensors, write_file
from minigpt.model.tensor_headers import SINGLE

CONFIG = "draft_heads.json"
NAME = "draft_heads"
"""What a decoder that they are trained on calls them."""
_INNER = 2


class DraftHeadsConfig(Config):
    """What draft heads are, and whose."""

    base: str
    """Id of the model's weights."""
    depth: int = Field(ge=1)
    """How many tokens ahead they were trained to guess."""
    hidden_size: int = Field(ge=1)
    """The model's width."""
    norm_eps: float = Field(gt=0)
    """Added to the variance."""


class DraftHeads(nn.Module):
    """(state, embedding of the next token) to the next state; see the module's text.

    Args:
        width: C, the model's.
        eps: Added to the variance by the norms.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.state_norm = RMSNorm(width, eps)
        self.token_norm = RMSNorm(width, eps)
        self.fuse = nn.Linear(2 * width, width, bias=False)
        self.inner_norm = RMSNorm(width, eps)
        self.up = nn.Linear(width, _INNER * width, bias=False)
        self.down = nn.Linear(_INNER * width, width, bias=False)
        self.norm = RMSNorm(width, eps)
        self.output: nn.Linear | None = None
        """The first rows of the model's output projection, where `use_output` took them."""

    def use_output(self, weight: Tensor) -> None:
        """Guess among the tokens of an (N, C) output projection alone, of which this is a copy.

        The product with all of a vocabulary is most of what a guess costs (FR-Spec,
        https://arxiv.org/abs/2502.14856).
        """
        with torch.device("meta"):
            output = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        output.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.output = output

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """Return the (..., C) state at a token.

        Args:
            state: (..., C) at the token before: of the model's final norm, or from here.
            embedding: (..., C) of the token.
        """
        joined = torch.cat((self.state_norm(state), self.token_norm(embedding)), dim=-1)
        fused = self.fuse(joined)
        fused = fused + self.down(F.silu(self.up(self.inner_norm(fused))))
        return self.norm(fused)  # type: ignore[no-any-return]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw fresh weights: normal with deviation 1 / sqrt(fan in), norms are ones."""
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[1]), generator=generator)


def count_parameters(config: ModelConfig) -> int:
    """Return how many elements a model's heads have."""
    with torch.device("meta"):
        heads = DraftHeads(config.hidden_size, config.norm_eps)
    return sum(parameter.numel() for parameter in heads.parameters())


def add_draft_heads(model: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """Freeze a decoder and give it fresh draft heads to train.

    Args:
        model: A decoder whose weights are loaded.
        config: Its.
        generator: On the device of the weights. The same state gives the same heads.
    """
    model.requires_grad_(False)
    heads = DraftHeads(config.hidden_size, config.norm_eps)
    heads.init_weights(generator)
    model.add_module(NAME, heads)


def draft_heads_of(model: nn.Module) -> DraftHeads:
    """Return the heads that `add_draft_heads` gave a decoder."""
    heads = model.get_submodule(NAME)
    assert isinstance(heads, DraftHeads)
    return heads


def save_draft_heads(directory: Path, heads: DraftHeads, config: DraftHeadsConfig) -> None:
    """Write heads into an existing directory.

    Raises:
        StorageError: A full disk, no permission.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in heads.state_dict().items()}
    with storage_errors(f"write {directory}"):
        write_file(directory / SINGLE, tensors)
        (directory / CONFIG).write_text(config.model_dump_json(indent=2) + "\n")


def read_draft_heads_config(directory: Path) -> DraftHeadsConfig:
    """Read what a directory's heads are, without their weights.

    Raises:
        ModelError: There are none.
    """
    try:
        tree: dict[str, Any] = json.loads((directory / CONFIG).read_bytes())
        return from_mapping(DraftHeadsConfig, tree)
    except (OSError, ValueError, ConfigError) as error:
        raise ModelError(
            f"no draft heads at {directory}: can't read {CONFIG}: {error}",
            remedy="give the draft_heads directory of a run with objective.kind=draft-heads",
        ) from None


def load_draft_heads(path: str | Path, base: str, *, dtype: torch.dtype, device: str) -> DraftHeads:
    """Load heads for a model's weights.

    Args:
        path: An artifact of draft heads.
        base: Id of the weights that are to be drafted for.
        dtype: To convert to.
        device: Where to put them.

    Raises:
        ModelError: They are for other weights, or misshapen.
        ArtifactError: Corrupt, or no draft heads.
    """
    directory = open_artifact(path, kind="draft-heads").path
    config = read_draft_heads_config(directory)
    if config.base != base:
        raise ModelError(
            f"the draft heads at {path} are for the weights {config.base[:12]}, not for "
            f"{base[:12]}: nearly nothing that they draft would be right",
            remedy="train heads for these weights: objective.kind=draft-heads",
        )
    stored = read_tensors([directory / SINGLE], device)
    with torch.device("meta"):
        heads = DraftHeads(config.hidden_size, config.norm_eps)
    try:
        heads.load_state_dict({n: t.to(dtype) for n, t in stored.items()}, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{directory / SINGLE}: {error}") from None
    return heads.eval().requires_grad_(False)
