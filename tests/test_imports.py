"""What a package needs to be imported, and that importing it does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PROGRAM = """
import importlib, pkgutil, sys
import torch, safetensors.torch, tokenizers, pydantic
import torch.distributed.checkpoint  # looks itself for zstandard, and can do without

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

REFUSED = set(sys.argv[2].split(","))
for name in [n for n in sys.modules if n.partition(".")[0] in REFUSED]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
package = importlib.import_module(f"minigpt.{sys.argv[1]}")
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""
OPTIONAL = (
    "alembic,datasets,datasketch,fastapi,ftfy,httpx,llguidance,lm_eval,mlflow,openai,"
    "prometheus_client,psutil,pyarrow,rich,sqlalchemy,starlette,structlog,tensorboard,tiktoken,"
    "transformers,typer,uvicorn,wandb,yaml,zmq,zstandard"
)


@pytest.mark.parametrize("package", ["train", "model", "data", "engine", "kernels"])
def test_the_core_of_the_work_needs_few_libraries(package: str) -> None:
    """Torch, numpy, safetensors, tokenizers and pydantic; fsspec comes with torch.

    The engine also takes msgspec, in which its requests are written.
    """
    refused = OPTIONAL if package == "engine" else OPTIONAL + ",msgspec"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, package, refused], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-800:]


def test_package_files_are_empty() -> None:
    """Importing a package does nothing; names come from the module that defines them."""
    for path in sorted((SOURCE / "minigpt").glob("*/__init__.py")):
        assert path.read_text(encoding="utf-8") == "", path
