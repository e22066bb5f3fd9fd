"""What a script needs around the method: device and dtype, a run folder, versions, peak memory,
one-line errors.

Called by train.py, eval.py, sweep.py and bench.py; nothing of LfU is in here.
"""
import json
import os
from pathlib import Path
import platform
import subprocess
import sys

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROOT = Path(__file__).resolve().parent.parent.parent


def command_line(main):
    """Run a script's main(): bad input (ValueError, OSError) becomes one line on stderr and exit
    status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(_complain(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def _complain(error):
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def pick_device(name):
    """torch.device of auto, cpu, cuda, cuda:N or mps; auto takes CUDA, then MPS, then the CPU.
    ValueError if not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(),
             "mps": int(torch.backends.mps.is_available())}
    if kind not in there or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"device {name!r}: write auto, cpu, cuda, cuda:N or mps")
    if int(index or 0) >= there[kind]:
        raise ValueError(f"device {name!r} is not there: this torch sees {there[kind]} of that "
                         "kind; "
                         "--device cpu runs everywhere")
    return torch.device(name)


def pick_dtype(name, device):
    """(name, torch.dtype) of auto, fp32, fp16 or bf16; auto is fp16 on CUDA and fp32 elsewhere
    (README, Half precision)."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return name, DTYPES[name]


def check_out(path):
    """Raise ValueError unless `path` can become a run folder: absent or empty, below a folder that
    can be written."""
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output folder {path} is not empty: name a new one, so that no earlier "
                         "run is overwritten")
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output folder {path} cannot be written: {there} is "
                         + ("read-only" if there.is_dir() else "not a folder"))


def next_run(kind, root="runs"):
    """The first unused folder runs/<kind>-NNN (not created yet)."""
    taken = [int(p.name.rpartition("-")[2]) for p in Path(root).glob(f"{kind}-*")
             if p.name.rpartition("-")[2].isdecimal()]
    return Path(root) / f"{kind}-{max(taken, default=-1) + 1:03d}"


def make_out(path, kind):
    """Create the run folder: `path`, or where it is None the next runs/<kind>-NNN, also if another
    run just took one."""
    while True:
        out = Path(path) if path else next_run(kind)
        try:
            out.mkdir(parents=True, exist_ok=path is not None)
            return out
        except FileExistsError:
            if path is not None:
                raise


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


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def duration(seconds):
    """3 s, 2 min 05 s, 1 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
