"""Training: checkpoint reader, reference model (the definition of correct), tasks, trainer.

``train`` needs torch, which is imported when it is first asked for: the checkpoint reader and the question
generator do without.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localdepth_train.trainer import Report, train

__all__ = ["Report", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from localdepth_train import trainer

    return getattr(trainer, name)
