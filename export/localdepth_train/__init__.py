"""Training: checkpoint reader, surgery, reference model (the definition of correct), tasks, trainer.

``train`` needs torch, so its module is imported when it is first asked for; the checkpoint reader, surgery and the
question generator do without.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localdepth_train.checkpoint import rewrite
    from localdepth_train.surgery import Surgery, retrofit
    from localdepth_train.trainer import Report, train

__all__ = ["Report", "Surgery", "retrofit", "rewrite", "train"]


def __getattr__(name: str) -> Any:
    if name == "rewrite":
        from localdepth_train import checkpoint

        return checkpoint.rewrite
    if name in ("Surgery", "retrofit"):
        from localdepth_train import surgery

        return getattr(surgery, name)
    if name in ("Report", "train"):
        from localdepth_train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
