from __future__ import annotations

from pathlib import Path

import pytest

from minigpt.data.tokenizer import Tokenizer
from minigpt.evaluate.code_samples import complete_code, is_accepted, parses
from minigpt.evaluate.config import EvaluateConfig
from minigpt.model.weights import load_model

PROMPT = "import os\n\n\nclass Box:\n"


@pytest.mark.parametrize(
    ("completion", "cut", "accepted"),
    [
        ("    x = 1\n", False, True),
        ("    x = 1\n\n    def f(self):\n        return (1,\n", False, False),
        # Cut off inside the last method: the statement in progress is dropped.
        ("    x = 1\n\n    def f(self):\n        return (1,\n", True, True),
        # Cut off inside a line: the line is dropped.
        ("    x = 1\n    y = (2 +", True, True),
        ("    x = 1\n    y = 2\nfoo(\n    1,\n", True, True),
        # A closing bracket at the outermost indentation does not begin a statement.
        ("    x = 1\nfoo(\n    1,\n)\n", True, True),
        # An error before the last statement counts.
        ("    x = = 1\n    y = 2\n    z = 3\n", True, False),
        ("    x = 1\n  y = 2\n    z = 3\n  w = 4\n", True, False),
        # Nothing but what is dropped, or nothing at all.
        ("    def f(self", True, False),
        ("    def f(self,\n", True, False),
        ("", False, False),
        ("\n\n", True, False),
    ],
)
def test_the_rule(completion: str, cut: bool, accepted: bool) -> None:
    assert is_accepted(PROMPT, completion, cut=cut) is accepted


@pytest.mark.filterwarnings("error")
def test_parses_survives_what_breaks_the_parser() -> None:
    assert parses("x = '\\d'\n")  # a SyntaxWarning, not an error
    assert not parses("x = \0\n")
    assert not parses("(" * 100_000)


def test_every_cut_of_real_code_is_judged_by_the_code_and_not_the_cut() -> None:
    """The true text, cut anywhere, is nearly always accepted: the rule is fair."""
    text = Path(is_accepted.__code__.co_filename).read_text()
    lines = text.splitlines(keepends=True)
    prompt = "".join(lines[:40])
    rest = text[len(prompt) :]
    cuts = range(200, len(rest), 97)
    accepted = sum(is_accepted(prompt, rest[:cut], cut=True) for cut in cuts)
    assert accepted / len(cuts) > 0.9


def test_samples_come_from_python_documents_alone(tiny_model: Path) -> None:
    loaded = load_model(tiny_model)
    tokenizer = Tokenizer.load(loaded.path)
    code = "".join(f"value_{i} = {i}\n" for i in range(30))
    texts = [b"not python at all\n" * 30, code.encode(), b"\xff" * 50, b"x = 1\n", code.encode()]
    config = EvaluateConfig(samples=5, sample_tokens=24, sample_prompt_lines=3, seed=1)
    samples = complete_code(loaded.model, tokenizer, texts, config)
    assert sorted(sample.document for sample in samples) == [1, 4]
    assert all(sample.prompt == "value_0 = 0\nvalue_1 = 1\nvalue_2 = 2\n" for sample in samples)
    assert all(sample.reference_accepted for sample in samples)
    # Random weights write no Python.
    assert not any(sample.accepted for sample in samples)
    assert complete_code(loaded.model, tokenizer, texts, config) == samples
