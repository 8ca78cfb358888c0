"""Serve this machine's CPU as an RPC device until standard input ends.

    python -m tests.rpc.server LIBRARY 127.0.0.1:PORT [THREADS]

Reading standard input ties the server's life to the process that started it: when that one dies, so does the pipe.
The protocol is neither checked nor encrypted: serve loopback only.
"""

import ctypes
import os
import sys
import threading

from localdepth.engine.ggml.lib import find_libraries

__all__ = ["main"]


def main(library: str, endpoint: str, n_threads: int = 1) -> None:
    """Accept one client after the other; returns only when the address cannot be used."""
    folder = find_libraries()
    assert folder is not None, "built against installed libraries"
    base = ctypes.CDLL(str(folder / "libggml-base.so.0"))
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so.0"))
    rpc = ctypes.CDLL(library)
    cpu.ggml_backend_cpu_reg.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    rpc.ggml_backend_rpc_start_server.restype = None
    rpc.ggml_backend_rpc_start_server.argtypes = (
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t),  # endpoint, folder of a cache, threads
        *(ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)),  # devices
    )
    device = ctypes.c_void_p(base.ggml_backend_reg_dev_get(cpu.ggml_backend_cpu_reg(), 0))
    rpc.ggml_backend_rpc_start_server(endpoint.encode(), None, n_threads, 1, ctypes.byref(device))


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)  # the server's loop has no end of its own


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    sys.exit(f"cannot serve at {sys.argv[2]}")
