"""Stock llama.cpp, through the low-level functions of the llama-cpp-python that is installed.

Flash attention on, F16 K/V. A layout says where stock keeps its weights:

- ``default``: what llama.cpp itself picks, the first extra buffer type that takes a tensor (AMX before CPU_REPACK);
- ``repack``: CPU_REPACK, picked by hand where AMX would come first;
- ``plain``: as in the file.

    python -m tests.bench.llama_cpp FILE        # computes a batch in the default layout: does this build survive it?

gcc before 14 compiles the AMX batches of ggml wrongly (``_tile_loadconfig`` drops stores): the process dies. One token
at a time does not use them, so such a build still decodes.
"""

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import llama_cpp.llama_cpp as stock
import numpy as np

from localdepth.engine.base import F32
from localdepth.engine.ggml.lib import find_libraries
from localdepth.quant import Quant

__all__ = ["Stock", "layouts", "survives_batches"]

_REPACKED = {Quant.Q4_0, Quant.Q4_K}  # what CPU_REPACK takes on every processor; others end the process
_messages: list[str] = []  # llama.cpp's, since the last load
_MATRICES = rb"(attn_[qkv]|output|ffn_gate|ffn_up|ffn_down)\.weight"


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def layouts(quant: Quant) -> list[str]:
    """The layouts that differ on this machine for weights of ``quant``."""
    extra = _extra_buffer_types()
    by_hand = quant in _REPACKED and "AMX" in extra and "CPU_REPACK" in extra
    return ["plain", *(["repack"] if by_hand else []), *(["default"] if extra else [])]


@cache
def survives_batches(path: Path) -> bool:
    """Whether this build computes several tokens at once in its default layout; tried in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.llama_cpp", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Stock:
    """One model in one context; positions continue from call to call."""

    def __init__(self, path: Path, layout: str, n_threads: int, n_ctx: int) -> None:
        _messages.clear()
        model = stock.llama_model_default_params()
        model.use_extra_bufts = layout == "default"
        if layout == "repack":
            chosen = (_Override * 2)(_Override(_MATRICES, _extra_buffer_types()["CPU_REPACK"]))
            model.tensor_buft_overrides = ctypes.cast(chosen, ctypes.c_void_p)
        context = stock.llama_context_default_params()
        context.n_ctx, context.n_threads, context.n_threads_batch = n_ctx, n_threads, n_threads
        context.flash_attn_type = stock.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._model = stock.llama_model_load_from_file(str(path).encode(), model)
        if self._model is None:
            raise OSError(f"llama.cpp does not load {path}: {_messages[-3:]}")
        self._context = stock.llama_init_from_model(self._model, context)
        self._n_vocab = stock.llama_vocab_n_tokens(stock.llama_model_get_vocab(self._model))

    def decode(self, tokens: Sequence[int]) -> F32:
        """Logits of the last token, [n_vocab]."""
        ids = (stock.llama_token * len(tokens))(*tokens)
        if status := stock.llama_decode(self._context, stock.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode ended with status {status}")
        logits = np.ctypeslib.as_array(stock.llama_get_logits_ith(self._context, -1), (self._n_vocab,))
        return logits.copy()

    def truncate(self, n: int) -> None:
        """Forget all positions from ``n`` on."""
        stock.llama_memory_seq_rm(stock.llama_get_memory(self._context), 0, n, -1)

    def close(self) -> None:
        stock.llama_free(self._context)
        stock.llama_model_free(self._model)


@cache
def _extra_buffer_types() -> dict[str, int]:
    """Address of each extra buffer type of the CPU, by name, in the order in which llama.cpp tries them."""
    folder = find_libraries()
    assert folder is not None, "llama_cpp was imported"
    base, cpu = ctypes.CDLL(str(folder / "libggml-base.so.0")), ctypes.CDLL(str(folder / "libggml-cpu.so.0"))
    address = ctypes.c_void_p
    cpu.ggml_backend_cpu_reg.restype = address
    for function, result, arguments in (
        (base.ggml_backend_reg_dev_get, address, (address, ctypes.c_size_t)),
        (base.ggml_backend_reg_get_proc_address, address, (address, ctypes.c_char_p)),
        (base.ggml_backend_buft_name, ctypes.c_char_p, (address,)),
    ):
        function.restype, function.argtypes = result, arguments
    registry = cpu.ggml_backend_cpu_reg()
    found = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(address), address)(found)(base.ggml_backend_reg_dev_get(registry, 0))
    types: dict[str, int] = {}
    while (one := listed[len(types)]) is not None:
        types[base.ggml_backend_buft_name(one).decode()] = one
    return types


def _keep_message(_level: int, text: bytes, _data: int | None) -> None:
    _messages.append(text.decode(errors="replace").rstrip())


_callback = stock.llama_log_callback(_keep_message)  # named: llama.cpp calls it as long as the process lives
stock.llama_log_set(_callback, ctypes.c_void_p(0))
stock.llama_backend_init()

if __name__ == "__main__":
    Stock(Path(sys.argv[1]), "default", 1, 64).decode(range(4))
