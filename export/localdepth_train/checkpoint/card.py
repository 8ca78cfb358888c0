"""The front matter of a model card: the lines between dashes at its head, where its licence stands."""

import re

__all__ = ["front_matter"]

_FRONT = re.compile(r"\ufeff?---[ \t]*\n(.*?)^---", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^(\w+):(.*\n(?:[ \t#-].*\n|\n)*)", re.MULTILINE)  # to the next line that begins a field


def front_matter(card: bytes) -> dict[str, str]:
    """Fields of a model card, their values as they are written: one line of YAML, or several; empty without any."""
    front = _FRONT.match("\n".join(card.decode(errors="replace").splitlines()))
    return {key: value.rstrip() for key, value in _FIELD.findall(front[1])} if front else {}
