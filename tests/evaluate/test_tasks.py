from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from minigpt.core.errors import ConfigError, DataError
from minigpt.data.tokenizer import Tokenizer
from minigpt.evaluate.config import EvaluateConfig
from minigpt.evaluate.tasks import run_tasks
from minigpt.model.attention import CausalAttention
from minigpt.model.weights import LoadedModel, load_model

pytest.importorskip("lm_eval")

MULTIPLE_CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: data/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: data/generate.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


def write_task(directory: Path, name: str, yaml: str, rows: list[dict[str, object]]) -> str:
    (directory / "data").mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "data" / f"{name}.jsonl").write_text(lines)
    path = directory / f"{name}.yaml"
    path.write_text(yaml)
    return str(path)


def log_probability(loaded: LoadedModel, tokens: list[int], first: int) -> float:
    """The log-probability of tokens[first:], by one plain forward pass."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        hidden = loaded.model(ids[:, :-1], torch.arange(len(tokens) - 1)[None], CausalAttention())
        logs = loaded.model.logits(hidden[0]).log_softmax(-1)
    return sum(float(logs[i - 1, tokens[i]]) for i in range(first, len(tokens)))


def test_multiple_choice_takes_the_likelier_answer(
    loaded: LoadedModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    questions = ["The sky is", "Two and two make", "Water is", "A cat is"]
    choices = [" red", " four", " wet and cold"]
    rows: list[dict[str, object]] = []
    right = 0
    for index, question in enumerate(questions):
        context = tokenizer.encode(question, bos=True)
        found = [
            log_probability(loaded, [*context, *tokenizer.encode(choice)], len(context))
            for choice in choices
        ]
        best = found.index(max(found))
        answer = best if index else (best + 1) % 3  # one wrong answer on purpose
        right += answer == best
        rows.append({"question": question, "choices": choices, "answer": answer})
    task = write_task(tmp_path, "choice", MULTIPLE_CHOICE, rows)
    metrics = run_tasks(loaded, tokenizer, EvaluateConfig(tasks=(task,)), 512)
    accuracy = metrics["task/tiny_choice/acc"]
    assert accuracy.estimate == right / 4 == 0.75
    assert accuracy.low is not None and accuracy.low < 0.75


def test_rolling_likelihood_and_generation(
    loaded: LoadedModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = ["A short text.", "One that is longer than the context of sixteen tokens by far."]
    rolling = write_task(tmp_path, "texts", ROLLING, [{"text": text} for text in texts])
    prompt = tokenizer.encode("Say it:", bos=True)
    answer: list[int] = []
    while len(answer) < 6:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            hidden = loaded.model(ids, torch.arange(ids.shape[1])[None], CausalAttention())
            answer.append(int(loaded.model.logits(hidden[0, -1]).argmax()))
    expected = tokenizer.decode(answer).partition("\n")[0]
    rows: list[dict[str, object]] = [
        {"text": "Say it:", "answer": expected},
        {"text": "Say it:", "answer": expected + "?"},
    ]
    generating = write_task(tmp_path, "generate", GENERATE, rows)
    metrics = run_tasks(loaded, tokenizer, EvaluateConfig(tasks=(rolling, generating)), 16)
    total = 0.0
    for text in texts:
        tokens = tokenizer.encode(text, bos=True)
        for start in range(1, len(tokens), 16):
            end = min(start + 16, len(tokens))
            # Consecutive windows; lm-eval lets the last one look back as far as it can.
            window = tokens[max(0, end - 17) : end]
            total += log_probability(loaded, window, len(window) - (end - start))
    size = sum(len(text) for text in texts)
    assert metrics["task/tiny_rolling/bits_per_byte"].estimate == pytest.approx(
        -total / math.log(2) / size, rel=1e-4
    )
    assert metrics["task/tiny_generate/exact_match"].estimate == 0.5


def test_bad_tasks_are_one_line(loaded: LoadedModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task file at"):
        run_tasks(loaded, tokenizer, EvaluateConfig(tasks=(str(tmp_path / "none.yaml"),)), 16)
    task = write_task(tmp_path, "choice", MULTIPLE_CHOICE.replace("data/", "gone/"), [])
    with pytest.raises(DataError, match=r"task file .*choice\.yaml") as error:
        run_tasks(loaded, tokenizer, EvaluateConfig(tasks=(task,)), 16)
    assert "\n" not in str(error.value)
