"""Models and adapters on disk that could take each other's place, and answers to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.model.config import LoraConfig
from minigpt.model.lora import add_adapters, save_adapter
from minigpt.model.weights import load_model, save_model


def config(**changes: object) -> EngineConfig:
    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "block_size": 4}
    return EngineConfig.model_validate(settings | changes)


def other_model(base: Path, directory: Path, seed: int, **changes: object) -> Path:
    """Write a model with other weights, and with some of its shape changed."""
    from minigpt.model.decoder import Decoder

    shape = load_model(base, verify=False).config.replace(**changes)
    model = Decoder(shape)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.output_weight.mul_(20)
    save_model(directory, model, shape, tokenizer_dir=base)
    return directory


def make_adapter(base: Path, directory: Path, seed: int, *targets: str) -> Path:
    """Write an adapter, in PEFT's layout, that changes answers."""
    model = load_model(base, verify=False).model
    lora = LoraConfig.model_validate({"rank": 3, "alpha": 6.0, "targets": targets or ("q_proj",)})
    generator = torch.Generator().manual_seed(seed)
    add_adapters(model, lora, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.5, generator=generator)
    directory.mkdir(parents=True)
    save_adapter(directory, model, lora, str(base))
    return directory


def request(name: str, prompt: str, tokens: int = 24, adapter: str | None = None) -> Request:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    ids = list(prompt.encode())
    return Request(id=name, prompt_token_ids=ids, sampling=sampling, adapter=adapter)


class Answers:
    """Steps an engine and gathers what its requests get."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.weights: dict[str, str] = {}

    def step(self) -> None:
        for delta in self.engine.step():
            assert delta.finish_reason != "error", delta.error
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.weights is not None:
                self.weights[delta.request_id] = delta.weights

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.step()

    def finish(self) -> dict[str, list[int]]:
        self.until(lambda: not self.engine.has_work)
        return self.tokens


def fresh(
    path: Path, prompts: dict[str, str], tokens: int = 24, **changes: object
) -> dict[str, list[int]]:
    """What an engine of these weights alone answers, one request at a time."""
    engine = Engine.load(path, config(**changes))
    found = Answers(engine)
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, tokens))
        found.finish()
    return found.tokens
