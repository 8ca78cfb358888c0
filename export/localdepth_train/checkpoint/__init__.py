"""Checkpoint folders: plain models, published looped models and our own layout, read and written as one."""

from localdepth_train.checkpoint.folder import Checkpoint, Unread, rewrite, save

__all__ = ["Checkpoint", "Unread", "rewrite", "save"]
