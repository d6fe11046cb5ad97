"""The command tree: each group is a file of its own, imported only when it is called for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import typer
from typer.models import CommandInfo

from minigpt.core.errors import MinigptError

COMMANDS = {
    "quickstart": "The whole loop on this machine: data, training, gate, serving, an answer.",
    "data": "Prepare and inspect token datasets.",
    "train": "Train a model from a recipe, or resume its run.",
    "chaos": "Inject faults into training and certify that the result is the same.",
    "jobs": "A queue of jobs on this machine or a Ray cluster; job specs; cluster simulation.",
    "evaluate": "Measure a model and judge it by a gate.",
    "parity": "Compare what is served with what was trained.",
    "compress": "Make a model smaller and report what that cost.",
    "models": "The registry: versions, aliases, promotion, import and export.",
    "serve": "Serve a model over an OpenAI-compatible API.",
    "replay": "Answer a logged request again, exactly.",
    "chat": "Talk to a served model in the terminal.",
    "artifact": "Verify and show artifacts and where they came from.",
    "doctor": "What this machine has and what that means.",
}
TOOLS = {"train": ("goodput", "plot", "verify-parallel")}
"""Words after a command that make it a group: `train RECIPE` runs, `train goodput DIR` looks. The
group is in `cli/<command>_tools.py`."""
INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit code, having printed any error as one line.

    Set MINIGPT_DEBUG=1 to see the traceback of an error as well.
    """
    completing = "_MINIGPT_COMPLETE" in os.environ
    words = _words_to_complete() if completing else arguments
    called, tool = _called(words)
    try:
        app = _build(called, tool=tool)
        # Without standalone mode Typer hands errors to us instead of boxing them.
        code = app(list(arguments), prog_name="minigpt", standalone_mode=completing)
    except (MinigptError, typer.TyperException) as error:
        if os.environ.get("MINIGPT_DEBUG"):
            raise
        return _report(error, called)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("minigpt: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _words_to_complete() -> list[str]:
    """Return what stands on the line that the shell asks to complete, after `minigpt`."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return line.split()[1:]


def _called(words: Sequence[str]) -> tuple[str | None, bool]:
    """Return which command stands on the line, and whether one of its tools is meant."""
    plain = [word for word in words if not word.startswith("-")]
    if not plain:
        return None, False
    return plain[0], plain[1:2] != [] and plain[1] in TOOLS.get(plain[0], ())


def _build(called: str | None, *, tool: bool = False) -> typer.Typer:
    """Make the command tree: the called command whole, the others as a line of help."""
    app = typer.Typer(
        help="From raw text to a served, watched, improving language model.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        pass  # `--version` is answered in `__main__`, before anything is imported

    for name, summary in COMMANDS.items():
        if name != called:
            app.command(name, help=summary)(_unreachable)
            continue
        module: typer.Typer = importlib.import_module(
            f"minigpt.cli.{name}_tools" if tool else f"minigpt.cli.{name}"
        ).app
        single = _single_command(module)
        if single is None:
            app.add_typer(module, name=name, help=summary, no_args_is_help=True)
        else:
            single.name = name
            single.help = single.help or summary
            app.registered_commands.append(single)
    return app


def _single_command(app: typer.Typer) -> CommandInfo | None:
    """Return the one command of an app that is a command itself rather than a group."""
    commands = app.registered_commands
    is_group = app.registered_groups or app.registered_callback or len(commands) != 1
    return None if is_group else commands[0]


def _unreachable() -> None:
    raise AssertionError("a command that was not called for was run")


def _report(error: MinigptError | typer.TyperException, called: str | None) -> int:
    if isinstance(error, MinigptError):
        message = str(error)
    else:
        message = error.format_message().rstrip(".")
        if not message:  # a bare group: its help has been printed
            return error.exit_code
        message += f" (see minigpt {called} --help)" if called in COMMANDS else " (see --help)"
    typer.echo("minigpt: " + " ".join(message.split()), err=True)
    return error.exit_code
