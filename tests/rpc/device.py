"""Start an RPC server and make its device known to ggml's registry.

    library = build(folder)
    with serve(library) as endpoint:
        name = register(library, endpoint)      # "RPC0", of the type that graphics processors have

``register`` cannot be undone, and ggml aborts a process whose server has gone: call it in a process made for the test.
The device says that it supports every operation, has no host memory and computes on the server's CPU.
"""

import ctypes
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from localdepth.engine.ggml.lib import find_libraries

__all__ = ["register", "serve"]

_LOOPBACK = "127.0.0.1"
_START_S = 20


@contextmanager
def serve(library: Path, n_threads: int = 1) -> Iterator[str]:
    """Address of a server that runs in a second process until the block ends.

    Raises:
        TimeoutError: it does not answer in time.
    """
    port = _free_port()
    endpoint = f"{_LOOPBACK}:{port}"
    command = [sys.executable, "-m", "tests.rpc.server", str(library), endpoint, str(n_threads)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_for(port, process)
            yield endpoint
        finally:
            process.kill()


def register(library: Path, endpoint: str) -> str:
    """Add the server's device to the registry of this process; returns the device's name."""
    folder = find_libraries()
    assert folder is not None, "built against installed libraries"
    ggml, base = ctypes.CDLL(str(folder / "libggml.so.0")), ctypes.CDLL(str(folder / "libggml-base.so.0"))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    ggml.ggml_backend_load.argtypes = (ctypes.c_char_p,)
    ggml.ggml_backend_register.argtypes = (ctypes.c_void_p,)
    base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    base.ggml_backend_reg_get_proc_address.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    base.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    base.ggml_backend_dev_name.restype = ctypes.c_char_p
    base.ggml_backend_dev_name.argtypes = (ctypes.c_void_p,)

    rpc = ggml.ggml_backend_load(str(library).encode())
    address = base.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_add_server")
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    servers = add_server(endpoint.encode())
    ggml.ggml_backend_register(servers)
    name: bytes = base.ggml_backend_dev_name(base.ggml_backend_reg_dev_get(servers, 0))
    return name.decode()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Until the server accepts: ggml's client would abort the process instead of trying again."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection((_LOOPBACK, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"no RPC server at port {port} after {_START_S} s (exit status {process.poll()})")
