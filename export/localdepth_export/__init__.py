"""Export: checkpoints become quantised model files, with the numbers to prove it."""

from localdepth_export.convert import Export, to_gguf
from localdepth_export.verification import Report, verify

__all__ = ["Export", "Report", "to_gguf", "verify"]
