"""Score a text twice, as training computes it and as the engine serves it, and compare."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.artifact import Artifact, create_artifact, is_artifact, open_artifact
from minigpt.core.errors import DataError, ModelError
from minigpt.core.storage import is_remote, storage_errors
from minigpt.data.tokenizer import Tokenizer
from minigpt.engine.config import ParityConfig
from minigpt.engine.engine import Engine
from minigpt.engine.prompt import Observer
from minigpt.engine.resolve import kv_cache_dtype
from minigpt.evaluate.certificate import PARITY_FILE, ParityReport, ParityRow
from minigpt.evaluate.parity import Comparison, TrainingSide
from minigpt.evaluate.report import Subject
from minigpt.evaluate.run import check_free
from minigpt.model.hf import quantization
from minigpt.model.weights import LoadedModel, load_model


def certify(
    model: str | Path,
    destination: str | Path,
    config: ParityConfig,
    *,
    text: Path | None = None,
    reference: str | Path | None = None,
) -> Artifact:
    """Compare training-side and serving-side log-probabilities and write the report.

    The training side is the decoder's plain forward pass over whole windows, in float32 and in
    each served dtype; the serving side the engine with its chunks, paged cache and packed
    weights: the text read as prompts, and greedy continuations token by token.

    Args:
        model: A model artifact or a Hugging Face directory: what is served.
        destination: Where the report artifact goes; nothing may be there.
        config: Dtypes, formats of the KV cache, sizes and the engine.
        text: A UTF-8 file; None is the source of Python's `argparse`.
        reference: The training side's model, for weights that were quantized afterwards; None
            is `model` itself.

    Returns:
        The report; its parents are those of the models that are artifacts.

    Raises:
        ModelError: No model, or the reference has another vocabulary.
        ConfigError: No runner serves such a dtype with such a KV cache here.
        DataError: The text is too short, or what the engine computes of it is not finite.
    """
    check_free(destination)
    content = _read(text)
    base = model if reference is None else reference
    expected = load_model(base, dtype="float32")
    served = load_model(model, verify=False)
    if expected.config.vocab_size != served.config.vocab_size:
        raise ModelError(
            f"the reference {base} has a vocabulary of {expected.config.vocab_size}, the model "
            f"{served.config.vocab_size}",
            remedy="give the model that the served one was made from",
        )
    windows = _windows(served, content, config)
    rows: list[ParityRow] = []
    for dtype, cache_format in itertools.product(config.dtypes, config.kv_cache_dtypes):
        settings = config.engine.replace(dtype=dtype, kv_cache_dtype=cache_format)
        engine = Engine.load(model, settings)
        rows += _compare(engine, base, windows, config.decode_tokens, _quantization(served))
    report = ParityReport(
        model=Subject(id=served.id, uri=_uri(model)),
        reference=Subject(id=expected.id, uri=_uri(base)),
        text=hashlib.sha256(content.encode()).hexdigest(),
        windows=len(windows),
        context_length=len(windows[0]),
        device=engine.config.device,
        threads=torch.get_num_threads(),
        rows=tuple({row.place: row for row in rows}.values()),
    )
    sources = dict.fromkeys(str(each) for each in (model, base) if _is_artifact(each))
    parents = [open_artifact(each, kind="model", verify=False) for each in sources]
    with create_artifact(destination, kind="report", parents=parents, config=config) as draft:
        tree = json.dumps(report.model_dump(mode="json"), indent=1) + "\n"
        (draft.path / PARITY_FILE).write_text(tree, encoding="utf-8")
        draft.metrics = {name: value.estimate for name, value in report.metrics().items()}
    assert draft.artifact is not None
    return draft.artifact


def _compare(
    engine: Engine, base: str | Path, windows: list[list[int]], decode_tokens: int, bits: str
) -> Iterator[ParityRow]:
    """Serve the windows once and compare with the training side in float32 and as served."""
    device, dtype = engine.config.device, engine.config.dtype
    answers = _decode(engine, windows, decode_tokens)
    for reference_dtype in dict.fromkeys(("float32", dtype)):
        loaded = load_model(base, dtype=reference_dtype, device=device, verify=False)
        side = TrainingSide(loaded.model)
        yield ParityRow(
            served_dtype=dtype,
            reference_dtype=reference_dtype,
            quantization=bits,
            kv_dtype=kv_cache_dtype(engine.config),
            runner=engine.runner_name,
            activation_bits=engine.activation_bits,
            prefill=_compare_prefill(engine, side, windows).numbers(),
            decode=_compare_decode(side, answers).numbers(),
        )


def _compare_prefill(engine: Engine, side: TrainingSide, windows: list[list[int]]) -> Comparison:
    """Read the windows as prompts, side by side, and compare their whole distributions."""
    found = Comparison()

    def observer(window: list[int], hidden: Tensor) -> Observer:
        def observe(first: int, served: Tensor) -> None:
            stop = first + served.shape[0]
            targets = torch.tensor(window[first + 1 : stop + 1], device=served.device)
            found.add(side.logits(hidden[first:stop]), served, targets)

        return observe

    sampling = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)
    for number, window in enumerate(windows):
        request = Request(id=f"parity-{number}", prompt_token_ids=window, sampling=sampling)
        engine.add(request, observe=observer(window, side.hidden(window)))
    _finish(engine)
    return found


_Answered = tuple[list[int], list[int], list[float]]
"""A prompt, its greedy continuation, and that one's log-probabilities."""


def _decode(engine: Engine, windows: list[list[int]], count: int) -> list[_Answered]:
    """Continue each window's beginning, all of them side by side."""
    sampling = SamplingParams(max_tokens=count, temperature=0, logprobs=0, ignore_eos=True)
    answers: dict[str, _Answered] = {}
    for number, window in enumerate(windows):
        prompt = window[: max(1, len(window) - count)]
        request = Request(id=f"parity-{number}", prompt_token_ids=prompt, sampling=sampling)
        answers[request.id] = (prompt, [], [])
        engine.add(request)
    for request_id, tokens, logprobs in _finish(engine):
        answers[request_id][1].extend(tokens)
        answers[request_id][2].extend(logprobs)
    return list(answers.values())


def _compare_decode(side: TrainingSide, answers: list[_Answered]) -> Comparison:
    found = Comparison()
    for prompt, tokens, logprobs in answers:
        hidden = side.hidden(prompt + tokens[:-1])[len(prompt) - 1 :]
        chosen = torch.tensor(tokens, device=hidden.device)
        found.add_chosen(side.logits(hidden), chosen, torch.tensor(logprobs, device=hidden.device))
    return found


def _finish(engine: Engine) -> list[tuple[str, list[int], list[float]]]:
    """Step until idle; return (request, tokens, log-probabilities) as they came."""
    found = []
    while engine.has_work:
        for delta in engine.step():
            if delta.finish_reason == "error":
                raise DataError(f"the engine could not compute the text: {delta.error}")
            logprobs = [entry.logprob for entry in delta.logprobs or ()]
            found.append((delta.request_id, delta.token_ids, logprobs))
    return found


def _read(text: Path | None) -> str:
    path = Path(argparse.__file__) if text is None else text
    with storage_errors(f"read {path}"):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None


def _windows(served: LoadedModel, content: str, config: ParityConfig) -> list[list[int]]:
    """Cut the text's first tokens into windows of equal length."""
    tokens = Tokenizer.load(served.path).encode(content, bos=True)[: config.max_tokens]
    limits = [config.context_length, served.config.context_length, len(tokens)]
    if config.engine.context_length != "auto":
        limits.append(config.engine.context_length)
    width = min(limits)
    if width <= config.decode_tokens:
        raise DataError(
            f"windows of {width} tokens: they must be longer than decode_tokens = "
            f"{config.decode_tokens}",
            remedy="give a longer text, or lower decode_tokens",
        )
    starts = range(0, len(tokens) - width + 1, width)
    return [tokens[start : start + width] for start in starts]


def _quantization(served: LoadedModel) -> str:
    tree = json.loads((served.path / "config.json").read_bytes())
    return quantization(tree)


def _is_artifact(model: str | Path) -> bool:
    return is_remote(model) or is_artifact(model)


def _uri(model: str | Path) -> str:
    return str(model) if is_remote(model) else str(Path(model).absolute())
