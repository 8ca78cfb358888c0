"""What is installed, what can run here, and the exact line to get what is missing."""

import importlib.util
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from localdepth.engine.ggml.lib import INSTALL_LINE, find_libraries, library
from localdepth.engine.onnx.session import INSTALL_LINE as ONNX_INSTALL_LINE
from localdepth.engine.onnx.session import onnxruntime
from localdepth.errors import LocalDepthError, ModelFileError, install_line
from localdepth.loading import load
from localdepth.memory import as_size, available_bytes
from localdepth.threads import idle_cores

__all__ = ["Finding", "Health", "examine"]

_EXTRAS = {
    "gguf": ("llama_cpp",),
    "onnx": ("safetensors", "ml_dtypes", "onnx"),
    "export": ("safetensors", "ml_dtypes", "onnx", "llama_cpp"),
    "train": ("torch", "safetensors", "ml_dtypes", "accelerate", "datasets", "matplotlib", "pyarrow"),
}
_TRIAL = "The lift is on floor 4. Go up 3. Go down 1. Which floor is the lift on?"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: whether it is good, what was seen, and what to type where it is not."""

    name: str
    good: bool
    seen: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """All findings; ``ready`` when a model can be run."""

    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        return all(finding.good for finding in self.findings if finding.name in ("python", "default model"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ready": self.ready, "findings": [asdict(finding) for finding in self.findings]}


def examine() -> Health:
    """Look at interpreter, machine, libraries, extras, and let the default model answer once."""
    extras = tuple(_extra(name, modules) for name, modules in _EXTRAS.items())
    return Health((_python(), _machine(), _onnx(), _ggml(), *extras, _default_model()))


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    seen = f"{platform.python_version()}, localdepth {version('localdepth')}"
    return Finding("python", good, seen, "" if good else "install Python 3.11 or newer")


def _machine() -> Finding:
    cores = f"{os.cpu_count()} cores, {idle_cores()} for compute"
    seen = f"{platform.system()} {platform.machine()}, {cores}, {as_size(available_bytes())} of memory free"
    return Finding("machine", True, seen)


def _onnx() -> Finding:
    try:
        seen = f"onnxruntime {onnxruntime().__version__}, runs folders of ONNX graphs"
    except LocalDepthError as error:
        return Finding("onnx", False, str(error), ONNX_INSTALL_LINE)
    return Finding("onnx", True, seen)


def _ggml() -> Finding:
    if find_libraries() is None:
        seen = "not installed; it runs GGUF files, large models faster than ONNX Runtime, on a GPU where it has one"
        return Finding("ggml", False, seen, INSTALL_LINE)
    try:
        lib = library()
    except LocalDepthError as error:
        return Finding("ggml", False, str(error), INSTALL_LINE)
    features = [name for name in ("avx2", "avx512", "neon") if getattr(lib, f"ggml_cpu_has_{name}")()]
    devices = [lib.ggml_backend_dev_name(device).decode(errors="replace") for device in lib.devices()]
    layouts = ", ".join(lib.extra_buffer_types()) or "none"
    return Finding(
        "ggml",
        True,
        f"{lib.version} in {find_libraries()} ({', '.join(features) or 'no vector features'}); devices "
        f"{', '.join(devices)}; packed layouts {layouts}",
    )


def _extra(name: str, modules: tuple[str, ...]) -> Finding:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    seen = f"missing {', '.join(missing)}" if missing else ", ".join(_versioned(module) for module in modules)
    return Finding(f"extra {name}", not missing, seen, install_line(name) if missing else "")


def _versioned(module: str) -> str:
    distribution = {"llama_cpp": "llama-cpp-python"}.get(module, module)
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def _default_model() -> Finding:
    engine = "ggml" if find_libraries() else "onnx"
    try:
        with load() as model:
            answer = model.generate(_TRIAL, max_tokens=16)
    except LocalDepthError as error:
        remedy = "install localdepth again" if isinstance(error, ModelFileError) else f"see {engine} above"
        return Finding("default model", False, str(error), remedy)
    return Finding("default model", True, f"answers {answer.text.strip()!r} at depth {answer.depth} with {engine}")
