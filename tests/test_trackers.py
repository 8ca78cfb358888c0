"""Records reach a tracker under names by depth; a missing package is named."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from localdepth.errors import MissingExtra, TrainError
from localdepth_train.trackers import Tracker, tracking

STEP = {"step": 3, "phase": "heal", "loss": 2.5, "depths": {"4": 2}, "tokens_per_second": 10}
LOOK = {"step": 3, "phase": "heal", "evaluation": {"loss": {"1": 3.0, "4": 2.0}, "cells": {"turn": {}}}}


def test_tensorboard_gets_numbers_and_evaluations_by_depth(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking("tensorboard", tmp_path) as send:
        send(STEP)
        send(LOOK)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "tokens_per_second", "loss/depth 1", "loss/depth 4"}
    [event] = events.Scalars("loss/depth 4")
    assert (event.step, event.value) == (3, 2.0)


@pytest.mark.parametrize(("tracker", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_tracker_that_is_not_installed_is_named(
    tracker: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=f"pip install {tracker}"), tracking(tracker, tmp_path):
        pass


def test_another_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=", ".join(Tracker)), tracking("wandb", tmp_path):
        pass
