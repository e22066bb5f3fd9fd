"""What a script needs around the method: device and dtype, versions, peak memory, one-line errors.

Called by every script; nothing of LfU is in here.
"""
import argparse
from contextlib import contextmanager
import math
import os
from pathlib import Path
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
THREADS = torch.get_num_threads()  # what torch chose, before anything set another number
ROOT = Path(__file__).resolve().parent.parent.parent


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors: one line, like all others, and no usage."""

    def error(self, message):
        raise ValueError(f"{message:.400} ({self.prog} --help lists all flags)")


def flag(name):
    """"batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


def check_positive(s, names, below=math.inf):
    """Raise ValueError naming the first of these settings that is given, but no positive number."""
    for name in names:
        value = getattr(s, name)
        if value is not None and not 0 < value < below:
            raise ValueError(f"{flag(name)} {value!s:.40} should be a positive number"
                             + (f" below {below:,}" if below < math.inf else ""))


def check_not_empty(s):
    """Raise ValueError naming a setting that is an empty text, as "$UNSET" makes it: it would pass
    for one that was not given."""
    for name, value in vars(s).items():
        if value == "" or isinstance(value, list) and "" in value:
            raise ValueError(f"{flag(name)} is empty")


def command_line(main):
    """Run a script's main(): bad input (ValueError, OSError) and too little memory become one line
    on stderr and exit status 2, Ctrl-C a word and 130; SIGTERM ends it with 143. What the screen's
    encoding lacks is printed as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # quiet imports, see train.py's begin
        signal.signal(signal.SIGINT, signal.default_int_handler)
    dies = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if dies:  # what is half written is cleaned up, what is done is shown
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(_complain(error))
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        sys.exit(_complain("out of memory: a smaller --batch-size needs less, more in "
                           f"docs/training.md ({str(error).splitlines()[0]:.200})"))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dies:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def stop_signals():
    """Inside the block Ctrl-C and SIGTERM stop nothing: they set `code`, of what the block gets, to
    130 or 143 (else 0), for a loop to see. A second Ctrl-C is a KeyboardInterrupt.

    Signals that are ignored (nohup) stay so; in a thread other than the main one nothing changes.
    """
    stop, pressed = SimpleNamespace(code=0), []

    def note(number, frame):
        stop.code = stop.code or 128 + number
        if number == signal.SIGINT:
            pressed.append(time.monotonic())
            if pressed[-1] - pressed[0] > 0.3:  # not one that was sent twice, as torchrun may
                raise KeyboardInterrupt
            if len(pressed) == 1 and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
                  if signal.getsignal(number) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _complain(error):
    print(f"error: {on_screen(' '.join(str(error).split()))}", file=sys.stderr)
    return 2


def pick_device(name):
    """torch.device of auto, cpu, cuda, cuda:N or mps; auto takes CUDA, then MPS, then the CPU.
    ValueError if not there."""
    if name == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind in found if found[kind]), "cpu")
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(),
             "mps": int(torch.backends.mps.is_available())}
    if kind not in there or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"device {name!r}: write auto, cpu, cuda, cuda:N or mps")
    if int(index or 0) >= there[kind]:
        raise ValueError(f"device {name!r} is not there: this torch sees {there[kind]} of that "
                         "kind; --device cpu runs everywhere")
    return torch.device(name)


def pick_dtype(name, device):
    """(name, torch.dtype) of auto, fp32, fp16 or bf16; auto is fp16 on CUDA and fp32 elsewhere
    (docs/method.md, Half precision)."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return name, DTYPES[name]


def environment():
    """Versions, platform and git commit, for settings.json: what a run can be repeated with."""
    from importlib.metadata import PackageNotFoundError, version
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "tiktoken", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True,
                                text=True, timeout=10)
        commit = commit.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {"versions": versions, "platform": platform.platform(), "git_commit": commit}


def machine():
    """"2 cores, AMD EPYC (AVX2); Python 3.11.7, torch 2.13.0+cpu": what numbers are measured
    on."""
    file = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.is_file() else None
    name = named[1] if named else platform.processor() or platform.machine()
    return (f"{os.cpu_count()} cores, {name} ({torch.backends.cpu.get_cpu_capability()}); "
            f"Python {platform.python_version()}, torch {torch.__version__}")


def spare_threads(parameters):
    """Half of the CPU threads, at most four, for a model of less than 10 million parameters: where
    other programs want the cores as well, its threads wait for each other all the time, and two are
    slower than one. OMP_NUM_THREADS, where it is set, stays in force."""
    if parameters < 1e7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, THREADS // 2), 4))


def peak_memory_mib(device):
    """Peak memory in MiB: of the device's allocator on CUDA, of the whole process elsewhere (None
    on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux; its ru_maxrss would begin with the peak of the parent process
    status = Path("/proc/self/status")
    if status.is_file() and "VmHWM:" in (text := status.read_text()):
        return int(text.split("VmHWM:")[1].split()[0]) / 2**10  # KiB
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # bytes on macOS, KiB on Linux
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def on_screen(text):
    """Text out of a file or a model, to be printed: control characters, which could move the cursor
    or change a terminal's colours, as their escapes; half a character as "?"."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)
    return text.encode("utf-8", "replace").decode()


def duration(seconds):
    """3 s, 2 min 05 s, 1 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def progress(title):
    """An on_progress(done, total) that writes 'title 32/200, 3.1/s, ETA 54 s' to stderr: in place
    on a terminal twice a second, else a line every 30 s."""
    terminal = sys.stderr.isatty()
    started = shown_at = time.time()
    last = 0

    def report(done, total):
        nonlocal started, shown_at, last
        now = time.time()
        if done < last:  # the next part of the measure
            started = now
        last = done
        if done and now - shown_at > (0.5 if terminal else 30):
            speed = done / max(now - started, 1e-9)
            print(f"{title} {done}/{total}, {speed:.1f}/s, ETA {duration((total - done) / speed)}",
                  end="   \r" if terminal else "\n", file=sys.stderr, flush=True)
            shown_at = now

    return report
