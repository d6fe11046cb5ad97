"""`minigpt quickstart`: the whole loop by the very commands that a user would type.

Each stage runs `minigpt ...` in a process of its own, so that what is judged and served is what
the disk holds. A stage whose artifact is there already is not run again: after an interruption
the same command goes on.
"""

from __future__ import annotations

import json as json_module
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.cli.output import JsonOption, emit
from minigpt.core.artifact import is_artifact, open_artifact
from minigpt.core.errors import ConfigError, GateError, MinigptError

app = typer.Typer()

PROMPT = "def read_file(path):\n"
STOP_SECONDS = 30


@app.command(epilog="Example: minigpt quickstart --directory runs/second")
def quickstart(
    directory: Annotated[
        Path, typer.Option(help="Where everything goes; an interrupted quickstart goes on there.")
    ] = Path("runs/quickstart"),
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A toy model in a minute, to see the loop turn.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Prepare text, train, evaluate, compress, gate, register, serve and ask: on this machine."""
    loop = Loop(directory.absolute(), tiny=tiny, quiet=json)
    result = loop.run()
    emit(result, json=json, human=lambda: _print_farewell(result))


class Loop:
    """The stages in order, each a command; the artifacts on disk are its only state."""

    def __init__(self, directory: Path, *, tiny: bool, quiet: bool) -> None:
        self.directory = directory
        self.name = "quickstart-tiny" if tiny else "quickstart"
        self.recipe = bundled(f"recipes/{'tiny' if tiny else 'pystdlib'}.yaml")
        self.data_config = bundled(f"recipes/data/{'tiny' if tiny else 'pystdlib'}.yaml")
        self.gate = bundled(f"gates/quickstart{'-tiny' if tiny else ''}.yaml")
        self.samples = 8 if tiny else 64
        self.quiet = quiet

    def run(self) -> dict[str, Any]:
        """Run every stage that is not done, then serve and ask.

        Raises:
            GateError: The compressed model did not pass; nothing was promoted.
            MinigptError: A stage failed; its own message has been printed.
        """
        started = time.monotonic()
        path = self._path
        self._stage("What this machine has", "doctor")
        self._stage(
            "Text becomes tokens", "data", "prepare", self.data_config, "--out", path("data"),
            makes=path("data"),
        )  # fmt: skip
        self._stage(
            "Tokens become a model", "train", self.recipe, "--run-dir", path("train"),
            "--set", f"data={path('data')}",
        )  # fmt: skip
        self._stage(
            "The model is measured, from its files", "evaluate", path("train/model"),
            "--data", path("data"), "--out", path("report"), "--samples", str(self.samples),
            makes=path("report"),
        )  # fmt: skip
        self._stage(
            "The model becomes smaller", "compress", path("train/model"), "--out", path("int8"),
            "--data", path("data"), makes=path("int8-report"),
        )  # fmt: skip
        self._stage(
            "The smaller model is judged", "evaluate", path("int8"), "--data", path("data"),
            "--out", path("int8-evaluation"), "--samples", str(self.samples),
            "--gate", self.gate, "--baseline", path("report"), makes=path("int8-evaluation"),
        )  # fmt: skip
        self._register()
        with self._server() as endpoint:
            answer = ask(endpoint["url"], endpoint["model"], PROMPT)
        return {
            "model": self.name,
            "directory": str(self.directory),
            "seconds": time.monotonic() - started,
            "start_seconds": endpoint["start_seconds"],
            **answer,
        }

    def _register(self) -> None:
        """Register the judged model once and make it champion."""
        versions = self._minigpt("models", "list", self.name, "--json", capture=True, check=False)
        target = self._path("int8")
        # By what it is, not by where: another model may have been registered from this place.
        made = open_artifact(target, kind="model", verify=False).id
        known = versions and any(
            version["id"] == made for version in json_module.loads(versions)["versions"]
        )
        if not known:
            self._stage(
                "The model gets a name", "models", "register", target, "--name", self.name,
                "--report", self._path("int8-evaluation"),
            )  # fmt: skip
        self._stage("The model becomes champion", "models", "promote", self.name)

    def _stage(self, title: str, *arguments: str, makes: str | None = None) -> None:
        if makes is not None and is_artifact(makes):
            self._say(f"\n== {title}: {makes} is there already")
            return
        self._say(f"\n== {title}\n$ minigpt {shlex.join(map(_short, arguments))}\n")
        self._minigpt(*arguments)

    def _minigpt(self, *arguments: str, capture: bool = False, check: bool = True) -> str:
        """Run a minigpt command; with --json of our own its output goes to standard error."""
        stdout: Any = subprocess.PIPE if capture else sys.stderr if self.quiet else None
        stderr = subprocess.DEVNULL if capture and not check else None
        done = subprocess.run(
            [sys.executable, "-m", "minigpt", *arguments], stdout=stdout, stderr=stderr, text=True
        )
        if done.returncode == GateError.exit_code and "--gate" in arguments:
            raise GateError("the gate did not pass, so nothing was promoted")
        if check and done.returncode:
            raise MinigptError(f"minigpt {arguments[0]} ended with code {done.returncode}")
        return (done.stdout or "") if done.returncode == 0 else ""

    @contextmanager
    def _server(self) -> Iterator[dict[str, Any]]:
        """Serve the champion on a free port; no process is left when the block ends."""
        arguments = ["serve", f"{self.name}@champion", "--port", "0", "--json"]
        self._say(f"\n== The champion is served\n$ minigpt {shlex.join(arguments)}\n")
        log = self.directory / "serve.log"
        with log.open("w") as stderr:
            server = subprocess.Popen(
                [sys.executable, "-m", "minigpt", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise MinigptError("the server did not start", remedy=f"see {log}")
            yield json_module.loads(line)
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()

    def _path(self, name: str) -> str:
        return str(self.directory / name)

    def _say(self, text: str) -> None:
        typer.echo(text, err=self.quiet)


def ask(url: str, model: str, prompt: str, *, max_tokens: int = 96) -> dict[str, Any]:
    """Stream one completion with the `openai` client and time it.

    Returns:
        `answer`; `ttft_seconds` to the first text; `tokens_per_second` of those after it.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    # The first request of a process pays for warming up: it is not the one that is timed.
    client.completions.create(model=model, prompt=prompt, max_tokens=2)
    begun = time.perf_counter()
    first, pieces, tokens = 0.0, [], 0
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0.7,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            first = first or time.perf_counter()
            pieces.append(chunk.choices[0].text)
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    ended = time.perf_counter()
    spread = ended - first
    return {
        "prompt": prompt,
        "answer": "".join(pieces),
        "tokens": tokens,
        "ttft_seconds": first - begun if first else ended - begun,
        "tokens_per_second": (tokens - 1) / spread if first and spread > 0 else 0.0,
    }


def bundled(name: str) -> str:
    """Find a recipe or gate: in the checkout, else where the wheel installed it."""
    places = [Path(__file__).parents[3], Path(sysconfig.get_path("data")) / "share" / "minigpt"]
    for place in places:
        if (place / name).is_file():
            return str(place / name)
    raise ConfigError(f"{name} is not beside the package", remedy="reinstall minigpt")


def _short(argument: str) -> str:
    """Show paths below the working directory as a user would type them."""
    return os.path.relpath(argument) if Path(argument).is_relative_to(Path.cwd()) else argument


def _print_farewell(result: dict[str, Any]) -> None:
    typer.echo(f"It said, after {result['prompt']!r}:\n")
    typer.echo("    " + result["answer"].replace("\n", "\n    "))
    typer.echo(
        f"\ntime to first token {result['ttft_seconds'] * 1000:.0f} ms, then "
        f"{result['tokens_per_second']:.0f} tokens/s; server ready in "
        f"{result['start_seconds']:.1f} s; all in {result['seconds'] / 60:.1f} minutes"
    )
    minigpt = _program()
    typer.echo(
        f"\nKeep it running:          {minigpt} serve {result['model']}@champion"
        f'\nTalk to it then:          {minigpt} chat "def main():"'
        f"\nSee where it came from:   {minigpt} models show {result['model']}@champion"
    )


def _program() -> str:
    """Return how to call minigpt from here, whether or not its environment is active."""
    if shutil.which("minigpt"):
        return "minigpt"
    return os.path.relpath(Path(sys.executable).parent / "minigpt")
