"""Every error a user can meet, as one tree.

A message says the value, the rule it breaks and what to do instead. The command line maps a class
to its exit code, a server to its status code; nobody parses messages.

    LocalDepthError                 exit 2
    ├── ModelFileError              a GGUF or ONNX model that cannot be trusted
    ├── CheckpointError             a Hugging Face style directory we cannot read
    ├── ConfigError                 sizes or options that contradict each other
    ├── RequestError                one request; the model stays usable
    │   ├── DepthError              depth outside the model's range
    │   ├── ContextOverflow         prompt or answer beyond n_ctx
    │   ├── PromptError             empty, ill-typed or undecodable prompt
    │   ├── SamplingError           impossible sampling settings
    │   ├── TemplateError           a chat template that fails or misbehaves
    │   └── BatchError              those prompts of a batch that were refused
    ├── MissingExtra                an optional package is needed
    ├── TrainError                  a training run that must not go on
    └── MachineError                exit 3: the machine, not the request
        ├── EngineError             the engine or its native library failed
        ├── OutOfMemory             more memory is needed than there is
        └── StorageError            disk or file system
"""

__all__ = [
    "BatchError",
    "CheckpointError",
    "ConfigError",
    "ContextOverflow",
    "DepthError",
    "EngineError",
    "LocalDepthError",
    "MachineError",
    "MissingExtra",
    "ModelFileError",
    "OutOfMemory",
    "PromptError",
    "RequestError",
    "SamplingError",
    "StorageError",
    "TemplateError",
    "TrainError",
    "install_line",
]


def install_line(extra: str) -> str:
    """What to type to get an optional part."""
    return f'pip install "localdepth[{extra}]" (in a clone of the repository: pip install -e ".[{extra}]")'


class LocalDepthError(Exception):
    """Root of all errors raised on purpose by this project."""

    exit_code = 2


class ModelFileError(LocalDepthError):
    """A model file is missing, damaged, foreign or from another version."""


class CheckpointError(LocalDepthError):
    """A checkpoint directory is missing, incomplete or of an unknown kind."""


class ConfigError(LocalDepthError):
    """Model sizes or options contradict each other."""


class RequestError(LocalDepthError):
    """One request cannot be served; the model remains usable."""


class DepthError(RequestError):
    """The depth asked for lies outside what the model or the cache allows."""


class ContextOverflow(RequestError):
    """Prompt and answer do not fit the context."""


class PromptError(RequestError):
    """The prompt is empty, of the wrong type, or names tokens that do not exist."""


class SamplingError(RequestError):
    """Sampling settings are outside their domain."""


class TemplateError(RequestError):
    """The file's chat template failed, or did something the sandbox forbids."""


class BatchError(RequestError):
    """Some prompts of a batch were refused; all others have been answered.

    Attributes:
        errors: by the prompt's index in the batch.
    """

    def __init__(self, errors: dict[int, RequestError]) -> None:
        index, first = next(iter(errors.items()))
        super().__init__(
            f"{len(errors)} of the prompts were refused, prompt {index} the first ({type(first).__name__}: {first}); "
            "all others have been answered, see errors for the rest"
        )
        self.errors = errors


class MissingExtra(LocalDepthError):
    """An optional package is needed; the message holds the line to type."""


class TrainError(LocalDepthError):
    """A training run cannot start or must not go on."""


class MachineError(LocalDepthError):
    """The machine failed, not the request."""

    exit_code = 3


class EngineError(MachineError):
    """An engine or its native library failed."""


class OutOfMemory(MachineError):
    """A model, or a request, needs more memory than the machine has; refused before it was taken."""


class StorageError(MachineError):
    """A file could not be read or written."""
