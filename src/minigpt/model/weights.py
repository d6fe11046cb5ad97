"""Loading and saving models: Hugging Face directories, which model artifacts are too."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.core.artifact import is_artifact, open_artifact
from minigpt.core.errors import ModelError
from minigpt.core.manifest import hash_file
from minigpt.core.storage import is_remote, storage_errors
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.hf import QUANT_METHOD, config_from_hf, is_quantized
from minigpt.model.hf_write import config_to_hf, family_of
from minigpt.model.linear import Int4Linear, Int8Embedding, Int8Linear
from minigpt.model.tensor_files import read_tensors, write_tensors
from minigpt.model.tensor_headers import weight_files
from minigpt.model.tensor_names import from_hf, to_hf

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SHARD_BYTES = 5_000_000_000

# What travels with a model so that its texts can be read; names as Hugging Face has them.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    model: Decoder
    """In eval mode."""
    config: ModelConfig
    path: Path
    """The local directory it came from; its tokenizer is there too."""
    id: str
    """The artifact's id; for a bare directory a hash of its configuration and weights."""


def load_model(
    path: str | Path, *, dtype: str | None = None, device: str = "cpu", verify: bool = True
) -> LoadedModel:
    """Load a model artifact or a bare Hugging Face directory.

    Weights on the CPU in their stored dtype are mapped from the files, not copied.

    Args:
        path: A directory, or for artifacts any URL.
        dtype: "float32", "bfloat16" or "float16" to convert to, None to keep what is stored.
            int8 and int4 weights stay what they are.
        device: Where to put the weights.
        verify: Compare an artifact's files with their hashes (about 1 GB/s).

    Raises:
        ModelError: No configuration or weights there, an unsupported configuration, missing,
            unexpected or misshapen tensors.
        ArtifactError: The artifact is corrupt or no model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown", remedy=f"one of {', '.join(DTYPES)}")
    directory = Path(path)
    identity = None
    if is_remote(path) or is_artifact(directory):
        artifact = open_artifact(path, kind="model", verify=verify)
        directory, identity = artifact.path, artifact.id
    tree = _read_json(directory, CONFIG)
    config = _add_stop_tokens(config_from_hf(tree), directory)
    files = weight_files(directory)
    stored = read_tensors(files, device)
    # Quantized weights are minigpt's own format and have the decoder's names in any family.
    tensors = stored if is_quantized(tree) else from_hf(stored, tree["model_type"])
    if dtype is not None:
        tensors = {
            n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in tensors.items()
        }
    model = _assemble(config, tensors, directory, quantized=is_quantized(tree))
    if model.model.rotary is not None:
        model.model.rotary.reset(device)
    if identity is None:
        identity = _content_hash([directory / CONFIG, *files])
    return LoadedModel(model.eval(), config, directory, identity)


def save_model(
    directory: str | Path,
    model_or_state: Decoder | Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_dir: str | Path | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write config.json, weights and tokenizer files in Hugging Face's layout.

    For an artifact call it on the draft of `create_artifact`, which makes it atomic. Dtypes are
    kept. A decoder with quantized layers is written as such.

    Args:
        directory: Made if it is not there.
        model_or_state: A decoder or its state dict.
        config: Its configuration.
        tokenizer_dir: A tokenizer artifact or a Hugging Face directory, whose tokenizer files
            are copied.
        max_shard_bytes: Largest weight file; beyond it there are several and an index.

    Raises:
        ModelError: The state is not the configuration's, or no tokenizer is in tokenizer_dir.
        StorageError: A full disk, no permission.
    """
    directory = Path(directory)
    state: Mapping[str, Tensor] = (
        model_or_state.state_dict() if isinstance(model_or_state, Decoder) else model_or_state
    )
    scales = {name: tensor for name, tensor in state.items() if name.endswith(".scale")}
    skeleton = _skeleton(config, scales)
    _check_names(skeleton.state_dict(), state, "the state to save")
    tree = config_to_hf(config)
    tree["torch_dtype"] = _dtype_name(state.values())
    if scales:
        tree["quantization_config"] = {"quant_method": QUANT_METHOD, **_scheme(skeleton)}
    tensors = dict(state) if scales else to_hf(state, family_of(config))
    with storage_errors(f"write {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        if tokenizer_dir is not None:
            for file in tokenizer_files(Path(tokenizer_dir)):
                shutil.copyfile(file, directory / file.name)
        text = json.dumps(tree, indent=2) + "\n"
        (directory / CONFIG).write_text(text, encoding="utf-8")
    write_tensors(directory, tensors, max_shard_bytes)


def check_vocab(config: ModelConfig, tokenizer_vocab_size: int) -> None:
    """Refuse a tokenizer that does not fit a model.

    The embedding may have more rows than the tokenizer has tokens (padding to a round number),
    by up to a tenth or 1,024.

    Raises:
        ModelError: The tokenizer has more tokens than the embedding has rows, or far fewer.
    """
    rows = config.vocab_size
    remedy = "use the tokenizer that the model was trained with"
    if tokenizer_vocab_size > rows:
        raise ModelError(
            f"the tokenizer has {tokenizer_vocab_size} tokens, but the model's vocabulary {rows}",
            remedy=remedy,
        )
    if rows - tokenizer_vocab_size > max(1024, rows // 10):
        raise ModelError(
            f"the tokenizer has only {tokenizer_vocab_size} tokens for the model's "
            f"vocabulary of {rows}",
            remedy=remedy,
        )


def tokenizer_files(source: Path) -> list[Path]:
    """Return the files of the tokenizer in a directory.

    Raises:
        ModelError: None is there.
    """
    if not (source / "tokenizer.json").is_file() and not (source / "merges.txt").is_file():
        raise ModelError(
            f"no tokenizer at {source}: neither tokenizer.json nor merges.txt is there",
            remedy="give a tokenizer artifact or a Hugging Face directory",
        )
    return [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"no model at {directory}: {name} is missing",
            remedy="give a model artifact or a Hugging Face directory",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"can't read {path}: {error}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds a {type(tree).__name__}, not an object")
    return tree


def _add_stop_tokens(config: ModelConfig, directory: Path) -> ModelConfig:
    """Add the ends of text that only generation_config.json knows, as chat models have them."""
    if not (directory / GENERATION_CONFIG).is_file():
        return config
    found = _read_json(directory, GENERATION_CONFIG).get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    known = {config.eos_token_id, *config.stop_token_ids}
    extra = tuple(dict.fromkeys(i for i in listed if isinstance(i, int) and i not in known))
    if config.eos_token_id is None and extra:
        return config.replace(eos_token_id=extra[0], stop_token_ids=extra[1:])
    return config.replace(stop_token_ids=config.stop_token_ids + extra)


def _assemble(
    config: ModelConfig, tensors: dict[str, Tensor], directory: Path, *, quantized: bool
) -> Decoder:
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("model.embed_tokens.weight")
    if config.tie_embeddings and head is not None and embedding is not None:
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise ModelError(
                f"{directory}: lm_head.weight differs from the embedding, though "
                "tie_word_embeddings is true",
                remedy="set tie_word_embeddings to false in config.json",
            )
        del tensors["lm_head.weight"]
    scales = {n: t for n, t in tensors.items() if quantized and n.endswith(".scale")}
    for name in (scale.removesuffix("scale") + "weight" for scale in scales):
        if name in tensors and tensors[name].data_ptr() % 16:
            # Mapped from wherever the file has it; the packed kernel needs whole 16 bytes.
            tensors[name] = tensors[name].clone()
    model = _skeleton(config, scales)
    _check_names(model.state_dict(), tensors, str(directory))
    model.load_state_dict(tensors, assign=True)
    return model


def _skeleton(config: ModelConfig, scales: Mapping[str, Tensor]) -> Decoder:
    """Build a decoder on `meta`, with quantized modules where there is a scale.

    One scale for each output means int8, several int4, as many as there are groups.
    """
    with torch.device("meta"):
        model = Decoder(config)
        modules = dict(model.named_modules())
        for scale, tensor in scales.items():
            name = scale.removesuffix(".scale")
            owner, _, attribute = name.rpartition(".")
            old = modules.get(name)
            made: nn.Module
            if isinstance(old, nn.Linear) and tensor.ndim == 2:
                sizes = (
                    old.in_features,
                    old.out_features,
                    old.in_features // max(1, tensor.shape[1]),
                )
                made = Int4Linear(*sizes, bias=old.bias is not None)
            elif isinstance(old, nn.Linear):
                made = Int8Linear(old.in_features, old.out_features, old.bias is not None)
            elif isinstance(old, nn.Embedding):
                made = Int8Embedding(old.num_embeddings, old.embedding_dim)
            else:
                continue  # reported as unexpected by the caller
            setattr(modules[owner], attribute, made)
    return model


def _scheme(model: Decoder) -> dict[str, object]:
    """Describe a quantized model for `config.json`."""
    groups = {module.group_size for module in model.modules() if isinstance(module, Int4Linear)}
    if not groups:
        return {"bits": 8, "scheme": "symmetric, weight-only, one scale per output channel"}
    return {
        "bits": 4,
        "group_size": min(groups),
        "scheme": "asymmetric, weight-only, a scale and a zero point per group of inputs; "
        "embedding and output projection as with 8 bits",
    }


def _check_names(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ModelError(f"{where}: {_listing(missing)} missing")
    unexpected = sorted(found.keys() - expected.keys())
    if unexpected:
        raise ModelError(
            f"{where}: {_listing(unexpected)} unexpected: config.json has no such part"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ModelError(
                f"{where}: {name} has shape {tuple(found[name].shape)}, but config.json makes it "
                f"{tuple(tensor.shape)}"
            )


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _dtype_name(tensors: Iterable[Tensor]) -> str:
    floating = next(t.dtype for t in tensors if t.is_floating_point())
    return str(floating).removeprefix("torch.")


def _content_hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{hash_file(file)}\n".encode())
    return digest.hexdigest()
