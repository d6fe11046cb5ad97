"""Run in llama.cpp's environment: `to_gguf.py HF_DIRECTORY OUT TYPE`, TYPE BF16, Q8_0 or Q4_0."""

# mypy: ignore-errors
import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main(source: Path, out: Path, kind: str) -> None:
    plain = out if kind == "BF16" else out.with_suffix(".bf16.gguf")
    convert(source, plain)
    if kind != "BF16":
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        failed = llama_cpp.llama_model_quantize(str(plain).encode(), str(out).encode(), parameters)
        plain.unlink()
        if failed:
            raise SystemExit(f"llama.cpp could not quantize to {kind}")


def convert(source: Path, out: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    add_tokenizer(writer, json.loads((source / "tokenizer.json").read_text()))
    for name, tensor in read_tensors(source):
        if name.endswith("q_proj.weight"):
            tensor = interleave(tensor, heads)
        elif name.endswith("k_proj.weight"):
            tensor = interleave(tensor, kv_heads)
        add_tensor(writer, rename(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, described) -> None:
    vocabulary = described["model"]["vocab"] | {
        token["content"]: token["id"] for token in described["added_tokens"]
    }
    special = {token["id"] for token in described["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = described["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if i in special else normal for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)


def read_tensors(source: Path):
    """Yield bf16 tensors as uint16 arrays, straight from the safetensors layout."""
    for path in sorted(source.glob("*.safetensors")):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        header_size = int(data[:8].view(np.uint64)[0])
        header = json.loads(bytes(data[8 : 8 + header_size]))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16", (name, entry["dtype"])
            begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
            yield name, np.array(data[begin:end]).view(np.uint16).reshape(entry["shape"])


def interleave(weight, heads: int):
    """Reorder rows from halves (i, i + D / 2) to pairs (2 i, 2 i + 1), as ggml rotates them."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def rename(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in fixed:
        return fixed[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part.removesuffix('.weight')]}.weight"


def add_tensor(writer, name: str, tensor) -> None:
    if tensor.ndim == 1:  # norms are fp32 in GGUF
        writer.add_tensor(name, (tensor.astype(np.uint32) << 16).view(np.float32))
        return
    raw = tensor.view(np.uint8).reshape(*tensor.shape[:-1], -1)
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
