from __future__ import annotations

from pathlib import Path

import pytest

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError, DataError
from minigpt.data.config import SourceConfig
from minigpt.data.files import find_files


def names(root: Path, **source: object) -> list[str]:
    found = find_files(from_mapping(SourceConfig, source))
    return [Path(file.path).relative_to(root).as_posix() for file in found]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.py", "deep/er/c.txt", ".git/config", "deep/.hidden", "d.jsonl.gz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "deep" / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


def test_directory_is_walked_in_order_without_hidden_files(tree: Path) -> None:
    found = names(tree, paths=[str(tree)])
    assert found == ["a.py", "b.txt", "d.jsonl.gz", "deep/er/c.txt", "deep/link.txt"]


def test_suffixes_globs_and_single_files(tree: Path) -> None:
    assert names(tree, paths=[str(tree)], suffixes=[".py"]) == ["a.py"]
    assert names(tree, paths=[f"{tree}/*.txt", f"{tree}/**/c.txt"]) == ["b.txt", "deep/er/c.txt"]
    assert names(tree, paths=[f"{tree}/.git/config"]) == [".git/config"]
    assert names(tree, paths=[str(tree)], kind="jsonl") == ["d.jsonl.gz"]


def test_a_file_named_twice_is_read_once(tree: Path) -> None:
    assert names(tree, paths=[f"{tree}/b.txt", f"{tree}/*.txt"]) == ["b.txt"]


@pytest.mark.parametrize("pattern", ["nowhere", "*.rs", "empty", "foo://bucket/x", "../x/[.txt"])
def test_paths_without_files_are_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    path = pattern if "://" in pattern else f"{tmp_path}/{pattern}"
    with pytest.raises(DataError, match=r"source\.paths: ") as caught:
        names(tmp_path, paths=[path])
    assert pattern in str(caught.value)
    assert "\n" not in str(caught.value)


def test_standard_library_has_packages_but_nothing_installed() -> None:
    found = find_files(SourceConfig(kind="pystdlib"))
    paths = [file.path for file in found]
    assert paths == sorted(paths)
    assert any(path.endswith("/asyncio/tasks.py") for path in paths)
    assert not any("-packages/" in path for path in paths)
    assert sum(file.size for file in found) > 10_000_000


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ({"kind": "text"}, "paths is required"),
        ({"kind": "pystdlib", "paths": ["x"]}, "must be empty"),
        ({"kind": "huggingface", "paths": ["x", "y"]}, "one directory or hub name"),
        ({"kind": "csv", "paths": ["x"]}, "kind = 'csv'"),
        ({"paths": ["x"], "seperator": "a"}, "did you mean 'separator'"),
    ],
)
def test_contradictory_sources_are_refused(source: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        from_mapping(SourceConfig, source)
