"""The folder of a run: runs/<aux>-NNN, or the one that --out names."""
import os
from pathlib import Path


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
    numbers = [p.name.rpartition("-")[2] for p in Path(root).glob(f"{kind}-*")]
    taken = [int(number) for number in numbers if number.isdecimal()]
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
