"""The folder of a run: runs/<aux>-NNN, or the one that --out names. What it records of itself, and
whether that is still so (--resume, --verify).

    settings.json    every setting, versions, hashes of model and data; written when training
                     begins, and once more at the end, with the hashes of what was saved
    log.jsonl        a line a step
    checkpoints/     see checkpoints.py
"""
from contextlib import contextmanager, suppress
import os
from pathlib import Path
import re
import shutil

from ..bundled import here
from ..engine import distributed, system
from ..files import hashes
from ..files.checkpoint import tokenizer_files
from ..files.jsons import read_json, write_json
from . import log


def check_out(path):
    """Raise ValueError unless `path` can become a run folder: absent or empty, below a folder that
    can be written. None: a new one in runs/."""
    if path and Path(path).is_dir() and any(Path(path).iterdir()):
        raise ValueError(f"output folder {path} is not empty: name a new one, so that no earlier "
                         "run is overwritten")
    path = Path(path or "runs")
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output folder {path} cannot be written: {there} is "
                         + ("read-only" if there.is_dir() else "not a folder"))


def next_run(kind):
    """The first unused folder runs/<kind>-NNN (not created yet)."""
    numbers = [p.name.rpartition("-")[2] for p in Path("runs").glob(f"{kind}-*")]
    taken = [int(number) for number in numbers if number.isdecimal()]
    return Path("runs") / f"{kind}-{max(taken, default=-1) + 1:03d}"


def make_out(path, kind):
    """Create the run folder: `path`, or where it is None the next runs/<kind>-NNN, also if another
    run just took one. Its log.jsonl, still empty, says that it is taken: ValueError if another run
    was faster."""
    while True:
        out = Path(path) if path else next_run(kind)
        try:
            out.mkdir(parents=True, exist_ok=path is not None)
            (out / "log.jsonl").touch(exist_ok=False)
            return out
        except FileExistsError:
            if path is not None:
                raise ValueError(f"output folder {out} was just taken by another run: name a new "
                                 "one") from None


def check(s):
    """Raise ValueError unless there can be a new run folder, or s.resume can go on."""
    if s.resume:
        check_same(s)
    else:
        check_out(s.out)
    if s.tune == "full":
        tokenizer_files(s.model)  # they will be copied


# ---- what a run records ----

def begin(s, device, **facts):
    """Create the folder of a new run and its settings.json; of s.resume nothing is written yet.
    Fills in s.data_sha256 and s.model_sha256. Returns the folder. facts: more for settings.json."""
    if s.resume:
        recorded = read_record(s.resume)
        s.data_sha256, s.model_sha256 = recorded["data_sha256"], recorded["model_sha256"]
        return Path(s.resume)
    s.data_sha256, s.model_sha256 = hashes.file_hash(s.data), hashes.model_hashes(s.model)
    out = make_out(s.out, s.aux if s.method in ("lfu", "sft") else s.method)
    write_json(out / "settings.json", {
        **{name: value for name, value in vars(s).items() if name not in ("resume", "verify")},
        **facts, "out": str(out), "device": str(device), **system.environment(),
        "saved_sha256": {}})
    return out


def going_on(s, step, device):
    """Record in settings.json that s.resume goes on after `step`, and where; files that were being
    written when it ended are removed."""
    out, recorded = Path(s.resume), read_record(s.resume)
    remove_half_written(out)
    now = {"after_step": step, "device": str(device), **system.environment()}
    if s.eval_data:
        now |= {"eval_data": s.eval_data, "eval_data_sha256": s.eval_data_sha256}
    if getattr(s, "eval_data_sha256", None) != recorded.get("eval_data_sha256"):
        print("eval     --eval-data is not what the run began with: losses before and after this "
              "step cannot be compared")
    write_json(out / "settings.json", {**recorded, "save_every": s.save_every, "keep": s.keep,
                                       "resumed": [*recorded["resumed"], now]})


def read_record(run):
    """The object in run/settings.json. Raises ValueError where what --resume and --verify need of
    it is missing."""
    recorded = read_json(Path(run) / "settings.json")
    recorded.setdefault("resumed", [])
    lacking = [name for name, kind in (("model", str), ("data", str), ("data_sha256", str),
                                       ("model_sha256", dict), ("processes", int), ("steps", int),
                                       ("saved_sha256", dict), ("resumed", list))
               if not isinstance(recorded.get(name), kind)]
    if lacking:
        raise ValueError(f"{run}/settings.json has no {', '.join(lacking)}: no run of this "
                         "train.py, or one of an earlier version")
    return recorded


def check_same(s):
    """Raise ValueError unless model, data and processes are those that s.resume recorded."""
    recorded = read_record(s.resume)
    if s.processes != recorded["processes"]:
        raise ValueError(f"{s.resume} runs with {recorded['processes']} processes, not "
                         f"{s.processes}: torchrun --nproc-per-node {recorded['processes']}")
    if wrong := problems(recorded, s.model, s.data):
        raise ValueError(f"--resume {s.resume}: not as the run began: {'; '.join(wrong)}")


def problems(recorded, model, file):
    """["data path/to/my.jsonl has changed", ...], of the files of the model and the data's file."""
    found = [f"{flag} {path} is gone; if it lies elsewhere now, name it with --{flag}"
             for flag, path in (("model", model), ("data", file)) if not Path(path).exists()]
    if Path(model).exists():
        changed = hashes.changed(recorded["model_sha256"], model, hashes.read_of_model)
        found += [f"model {model}: {name} {what}" for name, what in changed]
    if Path(file).exists() and hashes.file_hash(file) != recorded["data_sha256"]:
        found.append(f"data {file} has changed")
    return found


def finish(s, out):
    """Record the hashes of what was saved: from here on the run is finished. Its checkpoints are
    removed, unless --keep says how many stay."""
    recorded, saved = read_json(out / "settings.json"), hashes.saved_files(out)
    write_json(out / "settings.json", {**recorded, "saved_sha256": hashes.hash_files(out, saved)})
    tidy(s, out)


def tidy(s, out):
    """Remove what a finished run needs no more, if that can be: first under another name, so that
    what is called checkpoints/ is whole at any moment."""
    with suppress(OSError):
        if s.keep is None and (out / "checkpoints").is_dir():
            os.rename(out / "checkpoints", out / "checkpoints.tmp")
        remove_half_written(out)


def remove_half_written(folder):
    """Remove files and folders that were being written, or removed, when a process ended."""
    for path in folder.glob("*.tmp"):
        if path.is_dir() and re.fullmatch(r"(step-\d+|checkpoints)\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and re.fullmatch(r".+\.\d+\.tmp", path.name):  # jsons.written_aside's
            path.unlink()


def finished(run):
    """Whether the run has saved what it trained."""
    return bool(read_record(run)["saved_sha256"])


def say_finished(s, team):
    """What --resume does with such a run: a line. Returns the folder and its log, as train.main."""
    run, steps = Path(s.resume), read_record(s.resume)["steps"]
    if team.rank == 0:
        tidy(s, run)  # it may have been killed just before that
        print(f"{run} is finished: all {steps} steps are done and saved")
    distributed.leave()
    return run, log.read(run, steps)[0]


def verify(run, model=None, file=None):
    """Print that model, data and what was saved are the files that the run recorded, or raise a
    ValueError that names what is not. model, file: where model and data lie now, if not where they
    did. Returns what train.main returns."""
    recorded = read_record(run)
    model, file = model or here(recorded["model"]), file or here(recorded["data"])
    wrong = problems(recorded, model, file)
    saved = recorded["saved_sha256"]
    if saved:
        wrong += [f"saved: {name} {what}"
                  for name, what in hashes.changed(saved, run, hashes.read_of_run)]
    else:
        wrong.append("nothing is saved yet, the run has not finished")
    if wrong:
        raise ValueError(f"{run}: " + "; ".join(wrong))
    print(f"{run}: as recorded: model {model} ({', '.join(recorded['model_sha256'])}), "
          f"data {file}, saved ({', '.join(saved)})")
    return Path(run), log.read(run, recorded["steps"])[0]


@contextmanager
def locked(out):
    """Inside the block no other process may be: ValueError if one is. out: None in all processes
    of a run but 0, where nothing is done, as on systems without such locks (Windows, some network
    drives). A process that dies lets go."""
    try:
        import fcntl
    except ImportError:
        out = None
    if out is None:
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{out} is in use: another process trains there") from None
        yield
    finally:
        os.close(handle)
