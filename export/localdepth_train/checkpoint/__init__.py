"""Checkpoint folders: plain models, published looped models and our own layout, read and written as one."""

from localdepth_train.checkpoint.card import front_matter
from localdepth_train.checkpoint.folder import CARRIED, Checkpoint, Unread, rewrite, save

__all__ = ["CARRIED", "Checkpoint", "Unread", "front_matter", "rewrite", "save"]
