"""Run recurrent-depth language models on a laptop, and decide how hard they think.

import localdepth

with localdepth.load() as model:
    print(model.generate("...", depth=16).text)

Each name is imported when it is first asked for: what the command line needs is imported under its own guard.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localdepth.config import ModelConfig
    from localdepth.conversation import Conversation, Exchange, Reply
    from localdepth.errors import LocalDepthError
    from localdepth.generate import Generation, Stats, Stream, Token
    from localdepth.loading import inspect, load, plan
    from localdepth.memory import MemoryPlan
    from localdepth.model import Model
    from localdepth.policy.base import Decision, DepthPolicy, Query
    from localdepth.sampling import GREEDY, Sampling

__version__: str  # made when asked for, as all names here

__all__ = [
    "GREEDY",
    "Conversation",
    "Decision",
    "DepthPolicy",
    "Exchange",
    "Generation",
    "LocalDepthError",
    "MemoryPlan",
    "Model",
    "ModelConfig",
    "Query",
    "Reply",
    "Sampling",
    "Stats",
    "Stream",
    "Token",
    "__version__",
    "inspect",
    "load",
    "plan",
]

_HOMES = {
    "config": ("ModelConfig",),
    "conversation": ("Conversation", "Exchange", "Reply"),
    "errors": ("LocalDepthError",),
    "generate": ("Generation", "Stats", "Stream", "Token"),
    "loading": ("inspect", "load", "plan"),
    "memory": ("MemoryPlan",),
    "model": ("Model",),
    "policy.base": ("Decision", "DepthPolicy", "Query"),
    "sampling": ("GREEDY", "Sampling"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("localdepth")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"localdepth.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
