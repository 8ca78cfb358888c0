"""The ggml libraries that llama-cpp-python ships, opened once, with the functions we call.

Any misuse of ggml aborts the process, so nothing outside this package calls these functions: ``handles``,
``graph`` and ``quantize`` check their arguments first.
"""

import ctypes
import importlib.util
import itertools
import logging
import os
import platform
import threading
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Final

from localdepth.errors import EngineError, MissingExtra, install_line

__all__ = ["F16", "F32", "GPU_TYPES", "I32", "I64", "INSTALL_LINE", "Ggml", "find_libraries", "library"]

log = logging.getLogger(__name__)

INSTALL_LINE: Final = install_line("gguf")
# ggml's type ids for the tensors we make ourselves; those of weights come from the file's own table
F32, F16, I32, I64 = 0, 1, 26, 27
GPU_TYPES = (1, 2)  # enum ggml_backend_dev_type: with memory of its own, or integrated

_TESTED = "0.25."  # ggml_version() of llama-cpp-python 0.3.36
_TENSOR_BYTES = 336 + 32  # sizeof(struct ggml_tensor) + its bookkeeping; another size is another ABI
# The versioned names are the ones the libraries themselves ask for: opening any other maps a second copy. The plain
# ones are for builds without versions. The last of each is the registry of devices.
_FILES = {
    system: tuple(tuple(pattern.format(name) for name in ("ggml-base", "ggml-cpu", "ggml")) for pattern in patterns)
    for system, patterns in {
        "Linux": ("lib{}.so.0", "lib{}.so"),
        "Darwin": ("lib{}.0.dylib", "lib{}.dylib"),
        "Windows": ("{}.dll", "{}.dll"),
    }.items()
}

_first = threading.Lock()
_EXTRA = b"ggml_backend_dev_get_extra_bufts"
_LogCallback = CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(ctypes.Structure):
    """struct ggml_cplan, of which we read the beginning."""

    _fields_ = (("work_size", c_size_t), ("rest", c_uint8 * 120))


_P, _I, _L, _Z, _F = c_void_p, c_int, c_int64, c_size_t, c_float
# name -> (result, arguments); the whole surface we rely on
_FUNCTIONS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ggml_version": (c_char_p, ()),
    "ggml_log_set": (None, (_LogCallback, _P)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_graph_overhead_custom": (_Z, (_Z, c_bool)),
    "ggml_init": (_P, (_InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_new_tensor_1d": (_P, (_P, _I, _L)),
    "ggml_new_tensor_2d": (_P, (_P, _I, _L, _L)),
    "ggml_nbytes": (_Z, (_P,)),
    "ggml_view_1d": (_P, (_P, _P, _L, _Z)),
    "ggml_view_2d": (_P, (_P, _P, _L, _L, _Z, _Z)),
    "ggml_view_3d": (_P, (_P, _P, _L, _L, _L, _Z, _Z, _Z)),
    "ggml_reshape_2d": (_P, (_P, _P, _L, _L)),
    "ggml_reshape_3d": (_P, (_P, _P, _L, _L, _L)),
    "ggml_permute": (_P, (_P, _P, _I, _I, _I, _I)),
    "ggml_add": (_P, (_P, _P, _P)),
    "ggml_mul": (_P, (_P, _P, _P)),
    "ggml_scale": (_P, (_P, _P, _F)),
    "ggml_sqr": (_P, (_P, _P)),
    "ggml_sum_rows": (_P, (_P, _P)),
    "ggml_cont": (_P, (_P, _P)),
    "ggml_transpose": (_P, (_P, _P)),
    "ggml_reshape_1d": (_P, (_P, _P, _L)),
    "ggml_rms_norm": (_P, (_P, _P, _F)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_get_rows": (_P, (_P, _P, _P)),
    "ggml_set_rows": (_P, (_P, _P, _P, _P)),
    "ggml_cpy": (_P, (_P, _P, _P)),
    "ggml_swiglu_split": (_P, (_P, _P, _P)),
    "ggml_rope_ext": (_P, (_P, _P, _P, _P, _I, _I, _I, _F, _F, _F, _F, _F, _F)),
    "ggml_flash_attn_ext": (_P, (_P, _P, _P, _P, _P, _F, _F, _F)),
    "ggml_new_graph_custom": (_P, (_P, _Z, c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_gallocr_new": (_P, (_P,)),
    "ggml_gallocr_free": (None, (_P,)),
    "ggml_gallocr_reserve": (c_bool, (_P, _P)),
    "ggml_gallocr_reserve_n_size": (None, (_P, _P, _P, _P, POINTER(_Z))),
    "ggml_gallocr_alloc_graph": (c_bool, (_P, _P)),
    "ggml_gallocr_get_buffer_size": (_Z, (_P, _I)),
    "ggml_backend_cpu_init": (_P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_P, _I)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_get_default_buffer_type": (_P, (_P,)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_graph_plan": (_Plan, (_P, _I, _P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_buft_get_alloc_size": (_Z, (_P, _P)),
    "ggml_backend_buft_name": (c_char_p, (_P,)),
    "ggml_backend_cpu_buffer_from_ptr": (_P, (_P, _Z)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_buffer_get_base": (_P, (_P,)),
    "ggml_backend_buffer_get_size": (_Z, (_P,)),
    "ggml_backend_buffer_clear": (None, (_P, c_uint8)),
    "ggml_backend_buffer_set_usage": (None, (_P, _I)),
    "ggml_backend_tensor_alloc": (_I, (_P, _P, _P)),
    "ggml_backend_tensor_set": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_tensor_get": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_sched_new": (_P, (_P, _P, _I, _Z, c_bool, c_bool)),
    "ggml_backend_sched_free": (None, (_P,)),
    "ggml_backend_sched_reserve_size": (None, (_P, _P, POINTER(_Z))),
    "ggml_backend_sched_alloc_graph": (c_bool, (_P, _P)),
    "ggml_backend_sched_graph_compute": (_I, (_P, _P)),
    "ggml_backend_cpu_reg": (_P, ()),
    "ggml_backend_reg_dev_get": (_P, (_P, _Z)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, c_char_p)),
    "ggml_backend_dev_count": (_Z, ()),
    "ggml_backend_dev_get": (_P, (_Z,)),
    "ggml_backend_dev_name": (c_char_p, (_P,)),
    "ggml_backend_dev_description": (c_char_p, (_P,)),
    "ggml_backend_dev_type": (_I, (_P,)),
    "ggml_backend_dev_init": (_P, (_P, c_char_p)),
    "ggml_backend_dev_memory": (None, (_P, POINTER(_Z), POINTER(_Z))),
    "ggml_backend_dev_supports_op": (c_bool, (_P, _P)),
    "ggml_quantize_chunk": (_Z, (_I, POINTER(c_float), POINTER(c_uint8), _L, _L, _L, POINTER(c_float))),
    "ggml_cpu_has_avx2": (_I, ()),
    "ggml_cpu_has_avx512": (_I, ()),
    "ggml_cpu_has_neon": (_I, ()),
}


class Ggml:
    """The functions of ``_FUNCTIONS`` as typed attributes; make it through ``library()``."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort would otherwise start a debugger
        handles = [_open(folder / name) for name in _names(folder)]
        for name, (result, arguments) in _FUNCTIONS.items():
            function = next((f for handle in handles if (f := getattr(handle, name, None))), None)
            if function is None:
                raise EngineError(f"{folder} has no function {name}; reinstall the version we test: {INSTALL_LINE}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self._log = _LogCallback(_forward_log)  # kept: ggml calls it as long as the process lives
        self.ggml_log_set(self._log, None)
        self.version: str = self.ggml_version().decode()
        self.folder = folder
        if not self.version.startswith(_TESTED) or self.ggml_tensor_overhead() != _TENSOR_BYTES:
            raise EngineError(
                f"ggml {self.version} in {folder} is not the version we test ({_TESTED}x); "
                f"install llama-cpp-python as pinned: {INSTALL_LINE}"
            )

    def __getattr__(self, name: str) -> Any:  # for type checkers; real functions are set in __init__
        raise AttributeError(name)

    def context(self, n_bytes: int) -> int:
        """A context that holds ``n_bytes`` of tensor records and no data."""
        handle = self.ggml_init(_InitParams(n_bytes, None, True))
        if not handle:
            raise EngineError(f"ggml could not allocate {n_bytes} bytes of tensor records; free some memory")
        return int(handle)

    def devices(self) -> list[int]:
        """Every device ggml was built for, the CPU among them."""
        return [self.ggml_backend_dev_get(i) for i in range(self.ggml_backend_dev_count())]

    def extra_buffer_types(self) -> dict[str, int]:
        """The CPU's own layouts for weights by name, such as "CPU_REPACK"; handles of ggml buffer types."""
        device = self.cpu_device()
        address = self.ggml_backend_reg_get_proc_address(self.ggml_backend_cpu_reg(), _EXTRA)
        if not address:
            return {}
        listed = CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)  # ends with a null pointer
        handles = itertools.takewhile(bool, (listed[i] for i in itertools.count())) if listed else ()
        return {self.ggml_backend_buft_name(handle).decode(): handle for handle in handles if handle}

    def cpu_device(self) -> int:
        """Handle of the CPU as a device."""
        return int(self.ggml_backend_reg_dev_get(self.ggml_backend_cpu_reg(), 0))


def find_libraries() -> Path | None:
    """Folder of the libraries inside an installed llama-cpp-python, without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    return folder if all((folder / name).is_file() for name in _names(folder)) else None


def library() -> Ggml:
    """The libraries, opened and checked once per process.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        EngineError: it is, in a version we cannot use.
    """
    with _first:  # threads that load at the same time
        return _opened()


@cache
def _opened() -> Ggml:
    folder = find_libraries()
    if folder is None:
        raise MissingExtra(f"GGUF files need llama-cpp-python's ggml libraries; install them: {INSTALL_LINE}")
    return Ggml(folder)


def _names(folder: Path) -> tuple[str, ...]:
    system = platform.system()
    if system not in _FILES:
        raise EngineError(f"no ggml library names are known for {system}; use Linux, macOS or Windows")
    versioned, plain = _FILES[system]
    return versioned if (folder / versioned[0]).is_file() else plain


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"cannot open {path}: {error}; reinstall it: {INSTALL_LINE}") from error


def _forward_log(level: int, text: bytes | None, _data: object) -> None:
    levels = {2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
    if text:
        log.log(levels.get(level, logging.DEBUG), "%s", text.decode(errors="replace").rstrip())
