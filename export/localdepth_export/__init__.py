"""Export: checkpoints become quantised model files, with the numbers to prove it."""

from localdepth_export.carry import gguf_to_onnx, onnx_to_gguf
from localdepth_export.convert import Export, to_gguf
from localdepth_export.divergence import Outcome, compare_recipes
from localdepth_export.importance import Importance, collect
from localdepth_export.onnx_graphs.convert import to_onnx
from localdepth_export.recipe import Recipe
from localdepth_export.verification import Report, verify

__all__ = [
    "Export",
    "Importance",
    "Outcome",
    "Recipe",
    "Report",
    "collect",
    "compare_recipes",
    "gguf_to_onnx",
    "onnx_to_gguf",
    "to_gguf",
    "to_onnx",
    "verify",
]
