"""The front matter of a model card: the lines between dashes at its head, where its licence stands."""

import json
import re

__all__ = ["CARD", "front_matter", "inherited"]

CARD = "README.md"  # says what the weights are, so it is written anew when they change

_FRONT = re.compile(r"\ufeff?---[ \t]*\n(.*?)^---", re.DOTALL | re.MULTILINE)
_LICENSE = ("license", "license_name", "license_link")
_FIELD = re.compile(r"^(\w+):(.*\n(?:[ \t#-].*\n|\n)*)", re.MULTILINE)  # to the next line that begins a field


def front_matter(card: bytes) -> dict[str, str]:
    """Fields of a model card, their values as they are written: one line of YAML, or several; empty without any."""
    front = _FRONT.match("\n".join(card.decode(errors="replace").splitlines()))
    return {key: value.rstrip() for key, value in _FIELD.findall(front[1])} if front else {}


def inherited(card: bytes, base: str | None = None) -> str:
    """Front matter of what is made from a model with this ``card``: its licence, and its base unless one is given."""
    fields = front_matter(card)
    if base is not None:
        fields["base_model"] = " " + json.dumps(base)
    kept = (f"{key}:{fields[key]}" for key in (*_LICENSE, "base_model") if key in fields)
    return "\n".join(["---", *kept, "---", "", ""])
