"""The README's commands, run as they stand but for a smaller recipe and a free port."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def by_hand(page: str) -> str:
    """Return the block of commands that starts with `minigpt doctor`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    block = re.search(r"```\n(minigpt doctor.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1]


def parse(text: str) -> list[list[str]]:
    """Split each line into words, without its comment, which is in the page's language."""
    return [shlex.split(line, comments=True) for line in text.splitlines()]


def tiny_commands() -> list[list[str]]:
    """Return the README's commands, on the tiny recipe."""
    text = by_hand("README.md").replace("pystdlib.yaml", "tiny.yaml")
    text = text.replace("release.yaml", "quickstart-tiny.yaml")
    return parse(text)


def test_commands_by_hand(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "gates").symlink_to(ROOT / "gates")
    environment = os.environ | {"MINIGPT_HOME": str(tmp_path / "home")}
    commands = tiny_commands()
    names = " ".join(command[1] for command in commands)
    assert names == "doctor data train evaluate compress models models serve chat"

    def run(command: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, (command, done.stderr[-2000:])
        return done.stdout

    *offline, serve, chat = commands
    for command in offline:
        assert run(command)
    server = subprocess.Popen(
        [sys.executable, "-m", *serve, "--port", "0"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = re.search(r"http://\S+(?=/v1)", server.stdout.readline())
        assert url is not None
        assert run([*chat, "--url", url[0], "--max-tokens", "8"])
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        if server.stdout is not None:
            server.stdout.close()


def test_both_languages_show_the_same_commands() -> None:
    assert parse(by_hand("README.md")) == parse(by_hand("README.zh-CN.md"))


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "README.zh-CN.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page, link)
