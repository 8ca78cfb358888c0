"""Run recurrent-depth language models on a laptop, and decide how hard they think.

import localdepth

with localdepth.load() as model:
    print(model.generate("...", depth=16).text)
"""

from importlib.metadata import version

from localdepth.config import ModelConfig
from localdepth.errors import LocalDepthError
from localdepth.generate import Generation, Stats, Stream, Token
from localdepth.model import Model, inspect, load
from localdepth.policy.base import Decision, DepthPolicy, Query
from localdepth.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "Decision",
    "DepthPolicy",
    "Generation",
    "LocalDepthError",
    "Model",
    "ModelConfig",
    "Query",
    "Sampling",
    "Stats",
    "Stream",
    "Token",
    "__version__",
    "inspect",
    "load",
]

__version__ = version("localdepth")
