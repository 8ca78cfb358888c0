"""What ONNX files are made of: a model, how its tensors are stored, and what goes with them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from localdepth.config import ModelConfig
from localdepth.gguf import PROVENANCE, Key
from localdepth.onnx_folder.layout import Layout
from localdepth.onnx_folder.record import as_properties
from localdepth.record import Provenance, TokenizerRecord
from localdepth_export.onnx_graphs.weights import Encode

__all__ = ["Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """A model about to be written.

    Attributes:
        kind: where it comes from, for people: "Huginn", "GGUF", ...
        encode: gives the pieces of each tensor, in the order of the layout.
        files: tokenizer and licence as files, by name.
    """

    kind: str
    config: ModelConfig
    layout: Layout
    encode: Encode
    tokenizer: TokenizerRecord | None
    files: Mapping[str, bytes]
    provenance: Provenance

    @property
    def bits(self) -> dict[str, int]:
        """Of the numbers of each matrix, by name."""
        bits = self.layout.bits
        return {name: bits[name] for name, shape in self.config.tensors().items() if len(shape) > 1}

    def properties(self) -> dict[str, str]:
        """What every graph says of its model, as text under the keys of a GGUF file."""
        return as_properties(self.config) | {
            f"{PROVENANCE}{name}": value if isinstance(value, str) else ", ".join(value)
            for name, value in self.provenance.items()
        }

    def tokenizer_properties(self) -> dict[str, str]:
        """The tokenizer in the same way, for a graph that travels alone."""
        if (tokenizer := self.tokenizer) is None:
            return {}
        values = {
            Key.TOKENIZER_JSON: tokenizer.json,
            Key.BOS_ID: tokenizer.bos,
            Key.EOS_IDS: list(tokenizer.eos),
            Key.ADD_BOS: tokenizer.add_bos,
            Key.CHAT_TEMPLATE: tokenizer.chat_template,
        }
        return {
            str(key): value if isinstance(value, str) else json.dumps(value)
            for key, value in values.items()
            if value is not None
        }
