"""The state that a process's memory is in while something is timed, and what a call takes of it at its peak.

A block that the C library fetches from the kernel costs a page fault for every 4 KiB that is touched first. glibc gives large
blocks back as soon as they are freed, so that a method with much memory pays for it at every call. Two states make this visible:

    warm    nothing is given back: a call finds the pages that an earlier one left (a long-running process with an allocator
            that keeps memory)
    fresh   glibc as it comes, at the thresholds where its own adaption ends, and emptied before the call: every large block is
            new pages

On a GPU the same words stand for torch's caching allocator, left alone or emptied.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

STATES = ("warm", "fresh")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_MIB = 1 << 20
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Sample:
    """One timed call: wall and CPU time in seconds (all threads), and first touches of a page (None where unknown)."""

    wall_s: float
    cpu_s: float
    page_faults: int | None


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, when it is a glibc whose malloc is the one in use."""
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version.restype = ctypes.c_char_p
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None


def allocator() -> str:
    """What hands out memory, for the record."""
    library = _glibc()
    return f"glibc {library.gnu_get_libc_version().decode()}" if library else "unknown"


def huge_pages() -> str | None:
    """The kernel's setting of transparent huge pages, which decides what a fresh page costs."""
    try:
        words = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return next(w.strip("[]") for w in words.split() if w.startswith("["))
    except (OSError, StopIteration):
        return None


def load() -> list[float] | None:
    """Load averages of the machine: other work on the cores is in the wall times."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def states(device: torch.device) -> tuple[str, ...]:
    """The states that can be set here; ("as found",) where the allocator is not one that can be told."""
    return STATES if device.type == "cuda" or _glibc() else ("as found",)


def enter(state: str, device: torch.device) -> None:
    """Set the allocator's thresholds for a state."""
    library = _glibc()
    if device.type == "cuda" or library is None or state not in STATES:
        return
    # Zero mappings and a trim threshold of -1 (never), since mallopt takes an int and a peak may exceed 2 GiB.
    limits = (
        {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
        if state == "warm"
        else {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB}
    )
    for parameter, value in limits.items():
        if not library.mallopt(parameter, value):
            raise RuntimeError(f"mallopt({parameter}, {value}) was refused by {allocator()}")


def empty(device: torch.device) -> None:
    """Give free memory back, so that the next call starts with none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (library := _glibc()) is not None:
        library.malloc_trim(0)


def sample(run: Callable[[], object], state: str, device: torch.device) -> Sample:
    """Time one call in the state that was entered; its result is dropped after the clock has stopped."""
    if state == "fresh":
        empty(device)
    _finish(device)
    faults, wall, cpu = _faults(), time.perf_counter(), time.process_time()
    result = run()
    _finish(device)
    wall, cpu, after = time.perf_counter() - wall, time.process_time() - cpu, _faults()
    del result
    return Sample(wall, cpu, None if after is None or faults is None else after - faults)


def peak_extra(run: Callable[[], Any], device: torch.device) -> tuple[int | None, Any]:
    """Peak of a call's memory in bytes beyond what was there before (weights, updates), and the call's result, which counts.

    Resident memory of the process, or on a GPU the bytes of live tensors; None where neither can be read. Call it in the state
    "fresh": memory that the allocator kept would hide the peak.
    """
    empty(device)
    if device.type == "cuda":
        _finish(device)
        torch.cuda.reset_peak_memory_stats(device)
        live = torch.cuda.memory_allocated(device)
        result = run()
        _finish(device)
        return int(torch.cuda.max_memory_allocated(device)) - live, result
    try:
        _CLEAR.write_text("5")  # the high-water mark falls to what is resident now (man 5 proc)
        resident: int | None = _status("VmRSS")
    except OSError:
        resident = None
    if _glibc() is None:  # nothing was emptied, so the mark would be too low
        resident = None
    result = run()
    return (None if resident is None else max(0, _status("VmHWM") - resident)), result


def _status(key: str) -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def _faults() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
