"""The three training loops that `train_throughput` compares, each as its users run it."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from bench.harness import Gate

LAYERS, WIDTH, HEADS = 6, 384, 6


def random_tokens(vocab_size: int, shape: tuple[int, int], count: int = 8) -> list[torch.Tensor]:
    """Return `count` batches of (B, T + 1) uniform token ids: the speed depends on no text."""
    generator = torch.Generator().manual_seed(0)
    rows, length = shape
    return [
        torch.randint(vocab_size, (rows, length + 1), generator=generator) for _ in range(count)
    ]


def minigpt(
    gate: Gate, *, vocab: int, length: int, batch: int, optimizer: str, mlp: str, warmup: int
) -> None:
    """minigpt's own step, as `minigpt train` runs it."""
    from minigpt.data.loader import Batch
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder
    from minigpt.train.allocator import keep_freed_memory
    from minigpt.train.config import OptimizerConfig
    from minigpt.train.optimizer import Optimizer
    from minigpt.train.step import StepOptions, TrainStep

    keep_freed_memory(4 << 30)
    config = ModelConfig(
        vocab_size=vocab,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
        intermediate_size=WIDTH * 8 // 3 if mlp == "swiglu" else WIDTH * 4,
        context_length=length,
        mlp=mlp,
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    rates = OptimizerConfig(kind=optimizer, lr=1e-3, muon_lr=0.02)
    options = StepOptions(chunk_tokens=2048, dtype=torch.bfloat16, clip_norm=1.0, compile=True)
    step = TrainStep(model, Optimizer(model, rates), options)
    positions = torch.arange(length).expand(batch, length).contiguous()
    documents = torch.zeros(batch, length, dtype=torch.int32)
    batches = [
        Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, documents)
        for tokens in random_tokens(vocab, (batch, length))
    ]

    def run(number: int) -> None:
        step.run([batches[number % len(batches)]], 1.0)

    _loop(gate, run, warmup, _facts(model, config.flops_per_token(length)))


def nanogpt(gate: Gate, *, vocab: int, length: int, batch: int, checkout: str, warmup: int) -> None:
    """The step of nanoGPT's train.py: its model, optimizer and clipping; autocast to bf16."""
    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    torch.manual_seed(0)
    config = GPTConfig(
        block_size=length,
        vocab_size=vocab,
        n_layer=LAYERS,
        n_head=HEADS,
        n_embd=WIDTH,
        dropout=0.0,
        bias=False,
    )
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    compiled = torch.compile(model)
    batches = random_tokens(vocab, (batch, length))

    def run(number: int) -> None:
        tokens = batches[number % len(batches)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            _, loss = compiled(inputs, targets)  # type: ignore[no-untyped-call]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    # Position embeddings are looked up, not multiplied.
    products = sum(p.numel() for p in model.parameters() if p.ndim == 2) - length * WIDTH
    _loop(gate, run, warmup, _facts(model, _flops_per_token(products, length)))


def trainer(
    gate: Gate, *, vocab: int, length: int, batch: int, compiled: bool, warmup: int
) -> None:
    """`transformers.Trainer` on its GPT-2, bf16; each step waits for the gate's leave."""
    import tempfile

    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab,
        n_positions=length,
        n_layer=LAYERS,
        n_head=HEADS,
        n_embd=WIDTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    rows = torch.cat([t[:, :-1] for t in random_tokens(vocab, (batch, length), 64)])
    data = [{"input_ids": row, "labels": row} for row in rows]

    class Turns(transformers.TrainerCallback):
        begin = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == warmup:
                products = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
                products -= length * WIDTH
                gate.ready(**_facts(model, _flops_per_token(products, length)))
            if state.global_step >= warmup and not gate.permits():
                control.should_training_stop = True
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step > warmup:
                gate.took(time.perf_counter() - self.begin)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=batch,
            max_steps=1_000_000,
            learning_rate=1e-3,
            weight_decay=0.1,
            bf16=True,
            use_cpu=True,
            torch_compile=compiled,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[Turns()]).train()


def _facts(model: torch.nn.Module, flops_per_token: float) -> dict[str, Any]:
    parameters = {id(p): p.numel() for p in model.parameters()}
    return {"parameters": sum(parameters.values()), "flops_per_token": flops_per_token}


def _flops_per_token(products: int, length: int) -> float:
    """6 N + 12 L d s: forward and backward, attention counted as full."""
    return float(6 * products + 12 * LAYERS * WIDTH * length)


def _loop(gate: Gate, run: Any, warmup: int, facts: dict[str, Any]) -> None:
    for number in range(warmup):
        run(number)
    gate.ready(**facts)
    number = warmup
    while gate.permits():
        begin = time.perf_counter()
        run(number)
        gate.took(time.perf_counter() - begin)
        number += 1
