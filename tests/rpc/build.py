"""Build ggml's RPC backend alone, against the ggml libraries that are installed.

    python -m tests.rpc.build FOLDER

llama-cpp-python ships ggml without RPC, and building all of it again takes minutes. The backend is two source files
that need only ggml's own headers: both come from the sdist of the installed version (77 MB, through pip), the compiler
is ``$CXX`` or ``c++``. About 10 seconds where pip has the sdist in its cache. The library asks for the
``libggml-base.so.0`` that is already open in the process, so there is one copy of ggml. Linux only.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from localdepth.engine.ggml.lib import find_libraries

__all__ = ["LIBRARY", "build"]

LIBRARY = "libggml-rpc.so"
_SOURCES = ("src/ggml-rpc/ggml-rpc.cpp", "src/ggml-rpc/transport.cpp")
_HEADERS = (*(f"src/{name}.h" for name in ("ggml-impl", "ggml-backend-impl")), "src/ggml-rpc/", "include/")
# GGML_BACKEND_DL adds the entry points ggml_backend_load looks for; the others export and import as shared libraries
_DEFINES = ("GGML_BACKEND_DL", "GGML_BACKEND_SHARED", "GGML_BACKEND_BUILD", "GGML_SHARED")


def build(folder: Path) -> Path:
    """Path of the library in ``folder``, built there unless it already is.

    Raises:
        CalledProcessError: pip or the compiler fails; their own message is on standard error.
        FileNotFoundError: llama-cpp-python is not installed.
    """
    library = folder / LIBRARY
    if library.is_file():
        return library
    installed = find_libraries()
    if installed is None:
        raise FileNotFoundError("llama-cpp-python is not installed; there is nothing to build against")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as work:
        ggml = _sources(Path(work))
        command = [
            *(os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-fPIC", "-shared", "-pthread"),
            *(f"-D{name}" for name in _DEFINES),
            *(f"-I{ggml / part}" for part in ("include", "src", "src/ggml-rpc")),
            *(str(ggml / name) for name in _SOURCES),
            *("-o", f"{work}/{LIBRARY}", f"-L{installed}", "-l:libggml-base.so.0", f"-Wl,-rpath,{installed}"),
        ]
        subprocess.run(command, check=True)
        os.replace(f"{work}/{LIBRARY}", library)
    return library


def _sources(work: Path) -> Path:
    """Folder of ggml's sources, as far as they are needed."""
    name = f"llama-cpp-python=={version('llama-cpp-python')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "--dest", str(work), name], check=True)
    [sdist] = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        prefix = f"{sdist.name.removesuffix('.tar.gz')}/vendor/llama.cpp/ggml/"
        wanted = [m for m in archive if m.name.startswith(tuple(f"{prefix}{part}" for part in _HEADERS))]
        archive.extractall(work, wanted, filter="data")
    return work / prefix


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(build(parser.parse_args().folder))
