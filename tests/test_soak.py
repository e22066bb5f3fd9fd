"""Claim: memory and time a step stay flat over thousands of steps, checkpoints, validation and log
included.

Runs only where LFU_SOAK says how many steps, 10000 for the figures in docs/verification.md; prints
them (-s). Medians of the second and of the last tenth are compared: the first tenth warms up. Time
is that of the CPU, of which other programs on the machine take no part.
"""
import os
from pathlib import Path
import statistics
import time

import pytest

import train
from lfu_min.bundled import BUNDLED
from lfu_min.training import log

STATM = Path("/proc/self/statm")
STEPS = int(os.environ.get("LFU_SOAK", "0"))
MIB, FACTOR = 8, 1.25  # by how much memory may grow, by what factor a step may slow down


def resident():
    """This process's memory in MiB."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def tenths(values):
    """Medians of the second and of the last tenth."""
    size = len(values) // 10
    return statistics.median(values[size:2 * size]), statistics.median(values[-size:])


@pytest.mark.slow
@pytest.mark.skipif(STEPS < 100, reason="set LFU_SOAK to a number of steps, 100 or more")
@pytest.mark.skipif(not STATM.exists(), reason="/proc says how much memory there is")
@pytest.mark.parametrize("leak", [0, 2**18], ids=["as it is", "planted: 256 KiB a step"])
def test_memory_and_time_stay_flat(tmp_path, monkeypatch, leak):
    memory, seconds, kept, honest = [], [time.process_time()], [], log.write

    def write(out, record):
        honest(out, record)
        memory.append(resident())
        seconds.append(time.process_time())
        kept.append(b"x" * leak)
    monkeypatch.setattr(log, "write", write)
    lines = (BUNDLED / "data" / "word_problems_validation.jsonl").read_text().splitlines(True)
    (tmp_path / "others.jsonl").write_text("".join(lines[:16]))
    steps = max(STEPS // 100, 100) if leak else STEPS
    _, records = train.main(
        ["--max-steps", str(steps), "--batch-size", "2", "--lr", "1e-4", "--device", "cpu",
         "--save-every", "50", "--eval-data", str(tmp_path / "others.jsonl"),
         "--out", str(tmp_path / "run")])
    first, last = tenths(memory)
    print(f"memory {first:.1f} -> {last:.1f} MiB, highest {max(memory):.1f}")
    if leak:
        assert last - first > MIB
        return
    before, after = tenths([1000 * (b - a) for a, b in zip(seconds, seconds[1:])])
    print(f"{len(records)} steps: {before:.1f} -> {after:.1f} ms of the CPU a step")
    assert len(records) == steps and last - first <= MIB and after <= FACTOR * before
