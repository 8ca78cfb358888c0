"""How many threads to compute with."""

import os
import platform
from pathlib import Path

__all__ = ["choose_threads", "idle_cores"]

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_CPUS = Path("/sys/devices/system/cpu")
# Of core weights. Measured: two threads break even with one at a core of about 1 MB (0.84 x at 0.4, 1.06 x at 1,
# 1.4 x at 1.7 MB); with less to do they wait for each other longer than they work.
_BYTES_A_THREAD = 1 << 19


def idle_cores() -> int:
    """Physical cores this process may use, less one, at least one: threads that wait for each other hate company.

    Efficiency cores of Apple silicon do not count: every barrier would wait for them.
    """
    cores = min(_physical_cores(), _quota())
    if platform.system() == "Darwin":
        cores = _performance_cores() or cores
    return max(1, cores - 1)


def choose_threads(core_bytes: int) -> int:
    """Threads for a model whose core takes this many bytes."""
    return max(1, min(idle_cores(), core_bytes // _BYTES_A_THREAD))


def _physical_cores() -> int:
    """Two hyperthreads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        import psutil  # takes 20 ms

        return int(psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    logical = os.sched_getaffinity(0)
    try:
        return len({(_CPUS / f"cpu{i}" / "topology" / "thread_siblings_list").read_text() for i in logical})
    except OSError:
        return len(logical)


def _quota() -> int:
    """Cores that a container's limit amounts to; many where there is none."""
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return 1 << 16


def _performance_cores() -> int:
    """Fast cores of an Apple CPU, 0 where the system does not say."""
    import ctypes

    count, size = ctypes.c_int(0), ctypes.c_size_t(4)
    libc = ctypes.CDLL(None)
    if libc.sysctlbyname(b"hw.perflevel0.physicalcpu", ctypes.byref(count), ctypes.byref(size), None, 0):
        return 0
    return count.value
