from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "model.md"


def test_the_pages_example_runs(tiny_model: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example.replace("runs/first/model", str(tiny_model)), names)
    assert tuple(getattr(names["logits"], "shape", ())) == (1, 3, 257)
