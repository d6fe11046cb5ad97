"""What prompt look-up gains where text repeats, and what it costs where it does not.

In process, random weights of the 124M or 429M shape, greedy unless said, one step's logits as
the model computes them; each kind of text with drafting and without, in turns:

- copy: the answer repeats the prompt, but every `--edit`-th token is another one, as when a
  text is corrected. The answer is imposed by a bias on the logits: all else is computed.
- loop: nothing imposed: random weights soon repeat themselves.
- random: drawn at temperature 1, where hardly anything ever repeats.
- few words: imposed, random over 64 tokens: pairs of tokens always occurred before, and what
  followed is nearly never right. The worst that there is.

Formulas: tokens/s = generated tokens / wall time, medians over the rounds; the ratio is the
median of the rounds' ratios, in wall and in processor time (all threads).

Run it as `python -m bench.speculative`. With `--method heads --model PATH --heads PATH
--dataset PATH` it measures draft heads on a trained model instead: see `speculative_heads`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from bench.engine_throughput import make_engine
from bench.harness import environment, print_environment, print_table, write_results
from bench.serving.models import SHAPES
from bench.speculative_heads import compare_heads
from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.engine import Engine
from minigpt.engine.runner import ModelRunner
from minigpt.model.decoder import Decoder

VOCAB_SIZE = 50257
KINDS = ("copy", "loop", "random", "few words")
_BIAS = 1e4


class Dictated(Decoder):
    """A decoder with a bias towards saying `said[p]` after position p, where that is not None."""

    said: list[int] | None = None

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        hidden = super().forward(*inputs, **options)
        if self.said is not None:
            # Two numbers that bfloat16 holds exactly tell `logits` where it is.
            hidden[..., 0] = inputs[1] // 128
            hidden[..., 1] = inputs[1] % 128
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        if self.said is not None:
            for row, (high, low) in enumerate(hidden[..., :2].int().tolist()):
                logits[row, self.said[high * 128 + low]] = _BIAS
        return logits


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    if arguments.method == "heads":
        compare_trained(described, arguments)
        return
    rows = []
    for kind, concurrency in itertools.product(arguments.kinds, arguments.concurrency):
        rows.append(compare(kind, concurrency, arguments))
    print_table(
        ("text x concurrency", "tokens/s without", "with", "ratio", "least", "largest",
         "ratio of CPU", "drafted", "right"),
        [
            (f"{row['kind']} x {row['concurrency']}",
             *(f"{row[k]:.1f}" for k in ("without", "with")),
             *(f"{row[k]:.3f}" for k in ("ratio", "least", "largest", "cpu_ratio")),
             row["drafted"], row["accepted"])
            for row in rows
        ],
    )  # fmt: skip
    write_results(
        "speculative", {"environment": described, "settings": vars(arguments), "rows": rows}
    )


def compare_trained(described: dict[str, Any], arguments: argparse.Namespace) -> None:
    rows = [compare_heads(concurrency, arguments) for concurrency in arguments.concurrency]
    print_table(
        ("streams", "tokens/s without", "as it decides", "always", "ratio", "of CPU",
         "always: ratio", "of CPU", "right at 1, 2, ...", "share of drafting"),
        [
            (row["concurrency"], *(f"{value:.1f}" for value in row["tokens_per_second"]),
             *(f"{row[kind][i]:.3f}" for i in (0, 1) for kind in ("ratio", "cpu_ratio")),
             ", ".join(f"{value:.2f}" for value in row["right"]), f"{row['draft_share']:.2f}")
            for row in rows
        ],
    )  # fmt: skip
    write_results(
        "speculative_heads", {"environment": described, "settings": vars(arguments), "rows": rows}
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", choices=("ngram", "heads"), default="ngram")
    parser.add_argument("--model", help="heads: a trained model's artifact")
    parser.add_argument("--heads", help="heads: its draft heads")
    parser.add_argument("--dataset", help="heads: a dataset with its tokenizer")
    parser.add_argument("--draft-vocabulary", type=int, help="heads: draft among so many tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="heads: 0 is greedy")
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--edit", type=int, default=23, help="which of the tokens are edited")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft", type=int, default=8, help="max_draft_tokens")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--budget", default="auto", help="max_batched_tokens")
    return parser.parse_args()


def compare(kind: str, concurrency: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer the same requests with both engines, in turns."""
    methods = ({"method": "none"}, {"method": "ngram", "max_draft_tokens": arguments.draft})
    # The bias is the model's own code, which torch alone runs: with adapters nothing else serves.
    engines = [
        make_engine(arguments, Dictated, speculative=method, adapters=True) for method in methods
    ]
    chance = random.Random(concurrency)
    timings: list[list[tuple[float, float]]] = [[], []]
    for number in range(arguments.rounds + 1):
        prompt, said = make_text(kind, chance, arguments)
        for which in (0, 1) if number % 2 else (1, 0):
            timing = answer(engines[which], prompt, said, concurrency, kind, arguments)
            if number:
                timings[which].append(timing)
    stats = engines[1].stats()
    wall, cpu = ([[t[i] for t in timing] for timing in timings] for i in (0, 1))
    ratios = [a / b for a, b in zip(*wall, strict=True)]
    tokens = concurrency * arguments.output
    return {
        "kind": kind,
        "concurrency": concurrency,
        "without": tokens / statistics.median(wall[0]),
        "with": tokens / statistics.median(wall[1]),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "largest": max(ratios),
        "cpu_ratio": statistics.median(a / b for a, b in zip(*cpu, strict=True)),
        "drafted": stats.drafted_tokens,
        "accepted": stats.accepted_tokens,
    }


def make_text(
    kind: str, chance: random.Random, arguments: argparse.Namespace
) -> tuple[list[int], list[int] | None]:
    """Return a prompt and, where the answer is imposed, what follows each position."""
    length, output = arguments.prompt, arguments.output
    if kind == "few words":
        text = [chance.randrange(64) for _ in range(length + output + 1)]
        return text[:length], text[1:]
    prompt = [chance.randrange(VOCAB_SIZE) for _ in range(length)]
    if kind != "copy":
        return prompt, None
    repeated = list(itertools.islice(itertools.cycle(prompt), output + 1))
    for place in range(arguments.edit - 1, output, arguments.edit):
        repeated[place] = chance.randrange(VOCAB_SIZE)
    return prompt, (prompt + repeated)[1:]


_ids = itertools.count()


def answer(
    engine: Engine,
    prompt: list[int],
    said: list[int] | None,
    concurrency: int,
    kind: str,
    arguments: argparse.Namespace,
) -> tuple[float, float]:
    """Answer one prompt `concurrency` times at once; return seconds of wall and processor."""
    runner = engine._weights.runner
    assert isinstance(runner, ModelRunner)
    model = runner._model
    assert isinstance(model, Dictated)
    model.said = said
    sampling = SamplingParams(
        max_tokens=arguments.output,
        temperature=1.0 if kind == "random" else 0.0,
        seed=0,
        ignore_eos=True,
    )
    for _ in range(concurrency):
        engine.add(Request(id=str(next(_ids)), prompt_token_ids=prompt, sampling=sampling))
    wall, cpu = time.perf_counter(), time.process_time()
    found = 0
    while engine.has_work:
        found += sum(len(delta.token_ids) for delta in engine.step())
    assert found == concurrency * arguments.output
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
