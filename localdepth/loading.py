"""From a file or folder, or the name of one, to a loaded model: which engine, which limits."""

import os
from collections.abc import Sequence
from enum import StrEnum
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from typing import TypeVar

from localdepth.config import ModelConfig
from localdepth.engine.base import Engine, KvType, Limits
from localdepth.engine.ggml.device import DeviceName
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.ggml.lib import INSTALL_LINE, find_libraries, library
from localdepth.engine.ggml.plan import Planner as GgmlPlanner
from localdepth.engine.onnx.engine import OnnxEngine
from localdepth.engine.onnx.plan import Planner as OnnxPlanner
from localdepth.engine.toy import ToyEngine
from localdepth.errors import ConfigError, MissingExtra, ModelFileError
from localdepth.gguf import GgufFile
from localdepth.memory import MemoryPlan
from localdepth.model import Model
from localdepth.onnx_folder.folder import OnnxFolder, is_folder
from localdepth.policy.base import DepthPolicy
from localdepth.prompt import PromptReader
from localdepth.record import ModelFile
from localdepth.store.disk import open_model
from localdepth.store.folder import DEFAULT_NAME, find
from localdepth.threads import choose_threads

__all__ = [
    "DEFAULT_FOLDER",
    "DEFAULT_MODEL",
    "EngineName",
    "inspect",
    "load",
    "locate",
    "plan",
    "plan_file",
]

DEFAULT_MODEL, DEFAULT_FOLDER = "default.gguf", "default.onnx"  # the same model twice, inside localdepth/models
_E = TypeVar("_E", bound=StrEnum)
_DEFAULT_N_CTX = 4096  # longest context that is taken without being asked for


class EngineName(StrEnum):
    """Which engine runs a file; "auto" takes the one that is made for its kind."""

    AUTO = "auto"
    GGML = "ggml"  # GGUF files; the fastest, an extra
    ONNX = "onnx"  # folders of ONNX graphs; installed with the package
    TOY = "toy"  # numpy, slow; needs no compiler


def inspect(path: str | os.PathLike[str]) -> ModelConfig:
    """What a model file or folder holds, without loading its weights.

    Raises:
        ModelFileError: missing, damaged, or no looped model.
    """
    with open_model(locate(path)) as file:
        return file.config


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    engine: str = "auto",
    device: str = "auto",
    n_ctx: int | None = None,
    n_threads: int | None = None,
    ring: int | None = None,
    kv_depth: int | None = None,
    kv_type: str | None = None,
    low_memory: bool = False,
    memory_limit: int | None = None,
    policy: DepthPolicy | None = None,
) -> Model:
    """Load a model file.

    Args:
        model: path of a GGUF file or a folder of ONNX graphs, or the name of a stored model; None is the default model
            of the package, as GGUF where ggml is installed, else as ONNX.
        engine: "auto", "ggml" (GGUF files), "onnx" (folders) or "toy" (either).
        device: "auto" (a GPU where ggml was built for one), "cpu" or "gpu".
        n_ctx: positions a sequence may hold; None takes the model's own, at most 4096.
        n_threads: compute threads; None takes what the size of the model and the cores suggest.
        ring: share K/V between passes in a ring of this many planes; None keeps a plane per pass.
        kv_depth: deepest pass the cache makes room for; None is the measuring range, max(64, max_depth).
        kv_type: "f16", or "f32", which is all that ONNX Runtime can; None takes the smaller one that the engine has.
        low_memory: no copies of weights in faster layouts.
        memory_limit: bytes to stay within; None takes what the machine has free.
        policy: what ``depth="auto"`` means; None takes what the file brings.
    Raises:
        ModelFileError: the file is missing, damaged, or no looped model.
        ConfigError: a setting outside its range.
        MissingExtra: the engine's package is not installed.
        OutOfMemory: it does not fit; the message says what would.
        EngineError: the engine does not start, or there is no such device.
    """
    if policy is not None and not callable(getattr(policy, "decide", None)):
        raise ConfigError(f"policy={policy!r} has no decide method; pass a DepthPolicy, or depth= with each request")
    name = _choice(EngineName, "engine", engine)
    place = _choice(DeviceName, "device", device)
    with open_model(locate(model, name)) as file:
        limits = _limits(file, n_ctx, n_threads, ring, kv_depth, kv_type, low_memory, memory_limit)
        reader = PromptReader(file.tokenizer, file.config.n_vocab)
        return Model(_start(name, file, limits, place), reader, policy)


def plan(
    model: str | os.PathLike[str] | None = None,
    *,
    depth: int | None = None,
    n_ctx: int | None = None,
    ring: int | None = None,
    kv_type: str | None = None,
    low_memory: bool = False,
) -> MemoryPlan:
    """What ``load`` with these settings would take of the memory, without loading.

    Args:
        depth: passes of the sequence the plan is for; None is the model's default depth.
    Raises:
        ModelFileError, ConfigError, MissingExtra: as ``load``.
        DepthError: outside the measuring range.
    """
    with open_model(locate(model)) as file:
        wanted = file.config.default_depth if depth is None else depth
        return plan_file(file, [wanted], n_ctx=n_ctx, ring=ring, kv_type=kv_type, low_memory=low_memory)[0]


def plan_file(
    file: OnnxFolder | GgufFile,
    depths: Sequence[int],
    *,
    n_ctx: int | None,
    ring: int | None,
    kv_type: str | None,
    low_memory: bool,
) -> list[MemoryPlan]:
    """The same for an open file or folder, at several depths."""
    for depth in depths:
        file.config.check_depth(depth, measure=True)
    limits = _limits(file, n_ctx, None, ring, None, kv_type, low_memory, None)
    planner = OnnxPlanner(file, limits) if isinstance(file, OnnxFolder) else GgmlPlanner(library(), file, limits)
    return [planner.plan(depth) for depth in depths]


def _limits(
    file: ModelFile,
    n_ctx: int | None,
    n_threads: int | None,
    ring: int | None,
    kv_depth: int | None,
    kv_type: str | None,
    low_memory: bool,
    memory_limit: int | None,
) -> Limits:
    config = file.config
    if n_ctx is not None and not (isinstance(n_ctx, Integral) and n_ctx is not True and 1 <= n_ctx <= config.n_ctx):
        raise ConfigError(f"n_ctx={n_ctx!r} is outside 1..{config.n_ctx}, what this model was made for")
    core = sum(info.n_bytes for name, info in file.tensors.items() if name.startswith("core."))
    return Limits(
        n_ctx=int(n_ctx or min(config.n_ctx, _DEFAULT_N_CTX)),
        kv_depth=config.measure_depth if kv_depth is None else kv_depth,
        ring=ring,
        kv_type=_kv_type(file) if kv_type is None else _choice(KvType, "kv_type", kv_type),
        n_threads=choose_threads(core) if n_threads is None else n_threads,
        low_memory=low_memory,
        memory_limit=memory_limit,
    )


def _kv_type(file: ModelFile) -> KvType:
    return KvType.F32 if isinstance(file, OnnxFolder) else KvType.F16


def _start(name: EngineName, file: OnnxFolder | GgufFile, limits: Limits, device: DeviceName) -> Engine:
    if name is EngineName.TOY:
        _check_device(name, device)
        return ToyEngine(file.config, {tensor: file.array(tensor) for tensor in file.config.tensors()}, limits)
    if isinstance(file, OnnxFolder):
        _check_device(name, device)
        if name is EngineName.GGML:
            raise ConfigError(
                f'engine="ggml" runs GGUF files and {file.path} is a folder of ONNX graphs; leave the engine out, or '
                f"make a file of the checkpoint or of this folder: localdepth export gguf {file.path} -o model.gguf"
            )
        return OnnxEngine(file, limits)
    if name is EngineName.ONNX:
        raise ConfigError(
            f'engine="onnx" runs folders of ONNX graphs and {file.path} is a GGUF file; leave the engine out, or '
            f"make a folder of the checkpoint or of this file: localdepth export onnx {file.path} -o FOLDER"
        )
    if find_libraries() is None:
        raise MissingExtra(
            f"{file.path} is a GGUF file, which needs llama-cpp-python's ggml libraries; install them: {INSTALL_LINE}; "
            "or, with the extra onnx, make a folder of it that does without: "
            f'localdepth export onnx {file.path} -o FOLDER; or run it slowly: engine="toy" (--engine toy)'
        )
    return GgmlEngine(file, limits, device)


def _check_device(name: EngineName, device: DeviceName) -> None:
    if device is DeviceName.GPU:
        kind = "toy engine" if name is EngineName.TOY else "ONNX engine"
        raise ConfigError(f'the {kind} runs on the CPU alone; use a GGUF file and engine="ggml" with a GPU')


def locate(model: str | os.PathLike[str] | None, engine: EngineName = EngineName.AUTO) -> Path:
    """The file or folder that a path, or the name of a stored model, stands for; None is the default model.

    Args:
        engine: that will run it.
    Raises:
        ModelFileError: another directory, or nothing that names a file.
    """
    if model is None or (str(model) == DEFAULT_NAME and not os.path.exists(model)):
        return Path(str(files("localdepth") / "models" / _default_model(engine)))
    try:
        path = Path(model)
    except TypeError:
        raise ModelFileError(f"{model!r} is no path of a model file") from None
    if not os.path.exists(path) and (stored := find(str(model))):
        return stored
    if str(model) != "" and not os.path.lexists(path):
        raise ModelFileError(f"{path}: no such file, and no stored model of that name; see `localdepth models list`")
    if str(model) == "" or (os.path.isdir(path) and not is_folder(path)):
        checkpoint = path / "checkpoint" if (path / "checkpoint").is_dir() else path  # a training run has one inside
        raise ModelFileError(
            f"{path} is a directory, not a model file or folder; make one of a checkpoint with: "
            f"localdepth export gguf {checkpoint} -o model.gguf, or localdepth export onnx {checkpoint} -o FOLDER"
        )
    return path


def _default_model(engine: EngineName) -> str:
    """As what the default model is loaded."""
    if engine is EngineName.AUTO:
        return DEFAULT_MODEL if find_libraries() else DEFAULT_FOLDER
    return DEFAULT_FOLDER if engine is EngineName.ONNX else DEFAULT_MODEL


def _choice(kind: type[_E], name: str, value: str) -> _E:
    try:
        return kind(value.lower())
    except (ValueError, AttributeError):
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(kind)}") from None
