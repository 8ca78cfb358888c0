"""Run one experiment: every arm with every seed, then a table, a figure and a record.

    python -m localdepth_train.findings {pretrained,curriculum,retrofit,surgery,depth} -o FOLDER
        [--seeds 3] [--workers 2] [--steps N] [--base CHECKPOINT --text FILE]

Without ``--base`` it takes place on our questions, from plain models trained for it; with it on a text, from a real
checkpoint. A stopped experiment goes on; finished runs are not repeated. Arms are matched in FLOPs before they start.
"""

import argparse
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from localdepth_train.figures import (
    label_progress,
    label_shares,
    lines_with_intervals,
    looks_for,
    points_by_depth,
    sheet,
)
from localdepth_train.findings.experiments import EXPERIMENTS, make_base, make_start, run_arm
from localdepth_train.findings.grounds import LONGEST_TRAINED, Ground, TaskGround, TextGround
from localdepth_train.intervals import Interval, average, interval

Outcomes = Mapping[str, list[list[dict[str, Any]]]]  # by arm, of every seed: its evaluations as logged


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--text")
    given = parser.parse_args()
    ground: Ground = TextGround(given.base, given.text) if given.base else TaskGround()
    if given.steps:
        ground = ground.shortened(given.steps)
    folder = given.out / ("text" if given.base else "questions")
    outcomes = _run(given.experiment, ground, folder, given.seeds, given.workers)
    table = _tabulate(outcomes)
    print(f"{EXPERIMENTS[given.experiment].claim}\n{given.seeds} seeds, mean and 95 % t interval\n")
    print("\n".join(table))
    (folder / f"{given.experiment}.json").write_text(json.dumps(outcomes) + "\n")
    figure = folder / f"{given.experiment}.png"
    _draw(outcomes, figure)
    print(f"\n{figure}")


def _run(name: str, ground: Ground, folder: Path, seeds: int, workers: int) -> Outcomes:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        _wait([pool.submit(make_base, ground, folder, seed) for seed in range(seeds)])
        arms = EXPERIMENTS[name].arms
        turns = [(arm, seed) for seed in range(seeds) for arm in arms]
        _wait([pool.submit(make_start, name, arm, ground, folder, seed) for arm, seed in turns])
        jobs = {(arm, seed): pool.submit(run_arm, name, arm, ground, folder, seed) for arm, seed in turns}
        return {arm: [jobs[arm, seed].result() for seed in range(seeds)] for arm in arms}


def _wait(jobs: Sequence[Future[Path]]) -> None:
    for job in jobs:
        job.result()


def _tabulate(outcomes: Outcomes) -> list[str]:
    lines = []
    for measure, scale in (("loss", 1.0), ("accuracy", 100.0), ("deeper", 100.0)):
        cells = _by_depth(outcomes, measure, scale)
        if not any(cells.values()):
            continue
        depths = sorted(next(iter(cells.values())))
        lines += [f"| {measure} | " + " | ".join(f"depth {depth}" for depth in depths) + " |"]
        lines += ["|---" * (len(depths) + 1) + "|"]
        for arm, by_depth in cells.items():
            shown = (f"{by_depth[d].mean:.3g} ± {by_depth[d].half_width:.2g}" for d in depths)
            lines.append(f"| {arm} | " + " | ".join(shown) + " |")
        lines.append("")
    flops = {arm: float(np.mean([run[-1]["flops"] for run in runs])) for arm, runs in outcomes.items()}
    return [*lines, "FLOPs: " + ", ".join(f"{arm} {value:.3g}" for arm, value in flops.items())]


def _by_depth(outcomes: Outcomes, measure: str, scale: float) -> dict[str, dict[int, Interval]]:
    """Of each arm the last evaluation by depth, over seeds."""
    cells: dict[str, dict[int, Interval]] = {}
    for arm, runs in outcomes.items():
        last = [_values(run[-1]["evaluation"], measure) for run in runs]
        cells[arm] = {depth: interval([scale * one[depth] for one in last]) for depth in sorted(last[0])}
    return cells


def _values(evaluation: Mapping[str, Any], measure: str) -> dict[int, float]:
    """A measure by depth; "accuracy" of trained lengths, "deeper" of longer questions."""
    if measure == "loss":
        return {int(depth): value for depth, value in evaluation["loss"].items()}
    found: dict[int, list[float]] = {}
    for by_steps in evaluation.get("cells", {}).values():
        for steps, by_depth in by_steps.items():
            if (int(steps) > LONGEST_TRAINED) == (measure == "deeper"):
                for depth, share in by_depth.items():
                    found.setdefault(int(depth), []).append(share)
    return {depth: float(np.mean(shares)) for depth, shares in found.items()}


def _draw(outcomes: Outcomes, path: Path) -> None:
    """Loss at depth 8 against FLOPs, and the last loss by depth."""
    looks = looks_for(outcomes)
    has_questions = any(_by_depth(outcomes, "accuracy", 1.0).values())
    panels = [["progress", "loss"], *([["accuracy", "accuracy"]] if has_questions else [])]
    with sheet(path, panels) as axes:
        curves = {arm: average([_progress(run) for run in runs]) for arm, runs in outcomes.items()}
        lines_with_intervals(axes["progress"], curves, looks)
        label_progress(axes["progress"], "flops")
        axes["progress"].set_ylabel("held-out loss at depth 8")
        points_by_depth(axes["loss"], _by_depth(outcomes, "loss", 1.0), looks)
        axes["loss"].set_ylabel("held-out loss")
        if has_questions:
            points_by_depth(axes["accuracy"], _by_depth(outcomes, "accuracy", 1.0), looks)
            axes["accuracy"].set_ylabel("whole answers right")
            label_shares(axes["accuracy"])


def _progress(run: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    flops = np.array([record["flops"] for record in run])
    return flops, np.array([record["evaluation"]["loss"]["8"] for record in run])


if __name__ == "__main__":
    main()
