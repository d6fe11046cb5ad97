"""Bodies of the routes by which an operator changes a running server; adapters' as vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictStr

from minigpt.api.body import Body, neutral

Name = Annotated[StrictStr, Field(min_length=1)]


class SwapBody(Body):
    """Body of `POST /admin/swap`."""

    model: Name
    """A model artifact or a Hugging Face directory, as the server sees it."""


class LoadAdapterBody(Body):
    """Body of `POST /v1/load_lora_adapter`."""

    lora_name: Name
    """What requests give as their model."""
    lora_path: Name
    """A directory in PEFT's layout, or an adapter artifact, as the server sees it."""
    load_inplace: Annotated[Any, neutral(False)] = None


class UnloadAdapterBody(Body):
    """Body of `POST /v1/unload_lora_adapter`."""

    lora_name: Name
    lora_int_id: Annotated[Any, neutral()] = None
