"""Whole models of a fixed depth, the core written out pass by pass, for onnxruntime-genai.

It knows no loops, so every pass of a layer counts as a layer, with its own cache; weights are still stored once.
Layers are numbered in the order they run, and names are those that onnxruntime-genai gives the ports of a decoder.
"""

from typing import Any

import numpy as np

from localdepth.config import Injection, ModelConfig
from localdepth.onnx_folder.layout import Layout
from localdepth.onnx_folder.ports import SIDES, kv_head_dim
from localdepth.record import TokenizerRecord
from localdepth_export.onnx_graphs.builder import INT32, Builder, Value
from localdepth_export.onnx_graphs.layers import Cache, Layers, Place

__all__ = ["genai_config", "unrolled_graph"]


def unrolled_graph(config: ModelConfig, layout: Layout, depth: int) -> Builder:
    """From input_ids, attention_mask and position_ids to logits [B,T,V], ``depth`` passes from a state of zeros."""
    scope = Builder(layout)
    ids = scope.input("input_ids", np.int64, ["n_batch", "n_tokens"])
    layers = Layers(config, scope, _declare_place(scope))
    numbers = iter(range(_n_layers(config, depth)))

    def run(stage: str, x: Value) -> Value:
        own = [next(numbers) for _ in range(config.n_layer(stage))]
        x, caches = layers.stage(stage, x, [_declare_past(scope, config, number) for number in own])
        for number, cache in zip(own, caches, strict=True):
            _declare_present(scope, config, number, cache)
        return x

    injected = layers.injected(run("prelude", layers.embed(ids)))
    state = run("core", injected)  # from zeros, what is injected is all there is
    for _ in range(1, depth):
        state = run("core", state if config.injection is Injection.NONE else layers.inject(state, injected))
    logits = layers.head(run("coda", layers.enter_coda(state)))
    scope.output("logits", logits, np.float32, ["n_batch", "n_tokens", config.n_vocab])
    return scope


def genai_config(config: ModelConfig, depth: int, file_name: str, tokenizer: TokenizerRecord | None) -> dict[str, Any]:
    """The ``genai_config.json`` that goes with an unrolled graph in ``file_name``."""
    ends = list(tokenizer.eos) if tokenizer and tokenizer.eos else [0]  # it insists on one
    first = ends[0] if tokenizer is None or tokenizer.bos is None else tokenizer.bos
    return {
        "model": {
            "type": "llama",  # stands for any decoder
            "vocab_size": config.n_vocab,
            "context_length": config.n_ctx,
            "bos_token_id": first,
            "eos_token_id": ends,
            "pad_token_id": ends[0],
            "decoder": {
                "filename": file_name,
                "session_options": {"provider_options": []},
                "hidden_size": config.n_embd,
                "head_size": kv_head_dim(config),
                "num_attention_heads": config.n_head,
                "num_key_value_heads": config.n_head_kv,
                "num_hidden_layers": _n_layers(config, depth),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": config.n_ctx, "past_present_share_buffer": True},
    }


def _n_layers(config: ModelConfig, depth: int) -> int:
    return config.n_prelude + depth * config.n_core + config.n_coda


def _declare_place(scope: Builder) -> Place:
    mask = scope.input("attention_mask", np.int64, ["n_batch", "n_total"])
    positions = scope.input("position_ids", np.int64, ["n_batch", "n_tokens"])
    seen = scope.op("ReduceSum", mask, scope.constant([1]), keepdims=0)
    return Place(
        positions=positions,
        total=scope.op("Cast", scope.op("Shape", mask, start=1, end=2), to=INT32),
        last=scope.op("Cast", scope.op("Sub", seen, scope.constant(1)), to=INT32),
    )


def _declare_past(scope: Builder, config: ModelConfig, number: int) -> Cache:
    shape = "n_batch", config.n_head_kv, "n_past", kv_head_dim(config)
    return Cache(*(scope.input(f"past_key_values.{number}.{side}", np.float32, shape) for side in SIDES))


def _declare_present(scope: Builder, config: ModelConfig, number: int, cache: Cache) -> None:
    shape = "n_batch", config.n_head_kv, "n_present", kv_head_dim(config)
    for side, value in zip(SIDES, cache, strict=True):
        scope.output(f"present.{number}.{side}", value, np.float32, shape)
