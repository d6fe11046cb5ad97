"""`minigpt` and `python -m minigpt`: the version at once, everything else by `cli.main`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(f"minigpt {version('minigpt')}")
        sys.exit(0)
    from minigpt.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
