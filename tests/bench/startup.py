"""From a cold shell to the first token of the default model, in fresh processes.

    python -m tests.bench.startup [--runs 9]

The page cache is warm, as on a machine where localdepth ran before. The first line is what a person waits for; the
others run parts of it, each in fresh processes of its own, so they need not add up to the last millisecond.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

QUESTION = "Ann is older than Bob. Bob is older than Cid. Who is the oldest?"
TARGET_S = 0.5
_STAGES = f"""
import time
import localdepth.cli.ask
from localdepth import load
began = time.perf_counter()
model = load()
loaded = time.perf_counter()
next(iter(model.stream({QUESTION!r})))
print(loaded - began, time.perf_counter() - loaded)
"""


def first_byte_s(arguments: list[str]) -> float:
    """Seconds until a fresh Python writes its first byte to standard output, or ends."""
    began = time.perf_counter()
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        elapsed = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return elapsed


def stages_s() -> tuple[float, float]:
    """Seconds to load the model and to its first token, in a fresh process that has imported everything."""
    done = subprocess.run([sys.executable, "-c", _STAGES], capture_output=True, text=True, check=True)
    loading, answering = map(float, done.stdout.split())
    return loading, answering


def main() -> None:
    """Print the best and the median of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {}
    for _ in range(runs):
        python = first_byte_s(["-c", "print()"])
        imported = first_byte_s(["-m", "localdepth", "--version"])
        loading, answering = stages_s()
        for name, value in (
            ("localdepth ask, to the first token", first_byte_s(["-m", "localdepth", "ask", QUESTION])),
            ("  Python starts", python),
            ("  imports of the command line", imported - python),
            ("  the model loads", loading),
            ("  prompt and first token", answering),
        ):
            seconds.setdefault(name, []).append(value)
    for name, values in seconds.items():
        print(f"{name:36s} best {1000 * min(values):6.0f} ms   median {1000 * statistics.median(values):6.0f} ms")
    [total, *_] = seconds.values()
    print(f"target {TARGET_S} s: {'met' if statistics.median(total) <= TARGET_S else 'MISSED'} by the median")


if __name__ == "__main__":
    main()
