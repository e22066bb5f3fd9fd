"""One run of train.py and what is measured of it, kept in a folder so that nothing is done twice.

    FOLDER/run/             train.py's run
    FOLDER/trained          there once it has ended
    FOLDER/<measure>.json   what a measure found: {"numbers": {column: number}, "seconds": of work}

A record has the numbers of all of them in one file: the tables are made from it, and what stands in
it is not run again. Used by sweep.py, reproduce.py and real.py.
"""
import argparse
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
from statistics import fmean as mean
import sys
import time

import torch

from ..engine import system
from ..engine.passes import round_stream
from ..files import jsons
from ..training.folder import locked

RECORD = "measured.jsonl"  # in docs/results: every number behind its pages


def train_script():
    """train.py as a module: it lies in the repository, beside the package."""
    path = system.ROOT / "train.py"
    if not path.is_file():
        raise ValueError(f"{path} is missing: many runs need the repository, not the package alone")
    spec = importlib.util.spec_from_file_location("train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data_file(file, rows):
    """`file` with these records, one a line; written, as a whole, unless it is there."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        jsons.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def seeds(text):
    """"0,1,2" -> [0, 1, 2], for argparse."""
    found = text.split(",")
    if not all(map(str.isdecimal, found)) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} should be different whole numbers, like 0,1,2")
    return [int(seed) for seed in found]


def as_flags(setting):
    """{"lr": "1e-3"} -> ["--lr", "1e-3"]"""
    return [part for name, value in setting.items() for part in (f"--{name}", str(value))]


def trained(flags, folder):
    """The run folder of train.py with these flags, made unless it is there. What an interrupted run
    left is gone on with from its last checkpoint. No flag of train.py's: `stream`, the dtype that
    the residual stream is rounded to."""
    run, mark = folder / "run", folder / "trained"
    if not mark.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), open(folder / "log.txt", "a") as text, \
                contextlib.redirect_stdout(text):
            how = ["--resume", str(run)]
            if not any((run / "checkpoints").glob("step-*")):
                shutil.rmtree(run, ignore_errors=True)
                own = {name: value for name, value in flags.items() if name != "stream"}
                how = [*as_flags(own), "--out", str(run)]
            script = train_script()
            if "stream" in flags:
                script.load = rounding(script.load, system.DTYPES[flags["stream"]])
            script.main(how)
        mark.touch()
    return run


def rounding(load, dtype):
    """train.py's load(), the model's residual stream rounded to dtype; see passes.round_stream."""
    def rounded(*arguments):
        model = load(*arguments)
        round_stream(model, dtype)
        return model
    return rounded


def measured(flags, folder, measures, threads=1):
    """{measure: {"numbers", "seconds"}} of one run, measures being {name: function(run folder, or
    None for the base)}; flags None: of the base. Only what is not there is trained and measured;
    the first measure's seconds are the training's as well."""
    torch.set_num_threads(threads)
    found = {}
    for name, measure in measures.items():
        file, started = folder / f"{name}.json", time.time()
        if not file.is_file():
            run = None if flags is None else trained(flags, folder)
            folder.mkdir(parents=True, exist_ok=True)
            numbers = measure(run)
            jsons.write_json(file, {"numbers": numbers, "seconds": round(time.time() - started)})
        found[name] = jsons.read_json(file)
    return found


def worked(*job):
    """measured() in a process of a pool. A signal that stops its run ends the process as well: it
    would go on with the next job."""
    try:
        return measured(*job)
    except (KeyboardInterrupt, SystemExit):
        os._exit(1)


def recorded(record):
    """{(run, measure): {"numbers", "seconds", "machine"}} of a record's lines; none without a
    file."""
    if record is None or not record.is_file():
        return {}
    found = {}
    for where, row in jsons.read_records(record):
        own = [row.get(name) for name in ("run", "measure", "numbers", "seconds")]
        good = all(map(isinstance, own, (str, str, dict, (int, float))))
        if not good or not all(isinstance(x, (int, float, type(None)))
                               for x in own[2].values()):
            raise ValueError(f"{where}: a line of the record has a run, a measure, numbers and "
                             "seconds")
        found[own[0], own[1]] = {"numbers": own[2], "seconds": own[3],
                                 "machine": row.get("machine", "an unnamed machine")}
    return found


def missing(todo, record):
    """{run: (flags, folder, measures)}: what of {key: (flags, folder, measures)} is not in the
    record, each run once."""
    known, left = recorded(record), {}
    for flags, folder, own in todo.values():
        new = {m: own[m] for m in own if (folder.name, m) not in known}
        if new:
            earlier = left.get(folder.name, (None, None, {}))[2]
            left[folder.name] = flags, folder, earlier | new
    return left


def estimate(left, record, jobs):
    """"about 12 min 00 s", from what others took; of a measure that is not in the record, what all
    measures take on average."""
    took = {}
    for (_, measure), row in recorded(record).items():
        took.setdefault(measure, []).append(row["seconds"])
    if not took:
        return "how long they take is not known yet"
    every = mean(sum(took.values(), []))
    seconds = sum(mean(took.get(measure, [every])) for *_, own in left.values() for measure in own)
    return f"about {system.duration(seconds / jobs)}"


def announce(todo, record, jobs):
    """Print how much is to be done, and about how long it takes."""
    left = missing(todo, record)
    print(f"{len(todo)} rows and seeds, {len(left)} runs to make or measure: "
          f"{estimate(left, record, jobs)}", flush=True)


def all_measured(todo, jobs, threads=1, record=None):
    """{key: {column: number}} of {key: (flags, folder, measures)}, `jobs` at one time, each in a
    process of its own; a line a new result on the standard error. What is not finite has no number.

    record: a file of lines {"run", "measure", "numbers", "seconds", "machine"}, run being the
    folder's name. What stands in it is not measured again, what is new is added: unlike the folders
    it can be committed.

    Raises ValueError where a run does, one that diverges for instance, once the others are done.
    """
    known, left, started = recorded(record), missing(todo, record), time.time()
    failed = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(worked, *job, threads): run for run, job in left.items()}
        try:
            for i, job in enumerate(as_completed(pending), 1):
                run = pending[job]
                try:
                    found = job.result()
                except ValueError as error:
                    found, failed[run] = {}, error
                for measure, row in found.items():
                    known[run, measure] = row | {"machine": system.machine()}
                    note(record, run=run, measure=measure, **known[run, measure])
                eta = system.duration((time.time() - started) / i * (len(left) - i))
                print(f"{i}/{len(left)}  {run}{'  FAILED' if run in failed else ''}  ETA {eta}",
                      file=sys.stderr, flush=True)
        except BrokenProcessPool:
            raise ValueError("the process of a run was killed, perhaps for want of memory: give "
                             "the command again to go on, with --jobs 1 to need less")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # runs save a checkpoint first
            raise
    if failed:
        run, error = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {len(left)} runs failed, the others are kept; {run}: "
                         f"{error}")
    return {key: {column: number for measure in own
                  for column, number in known[folder.name, measure]["numbers"].items()
                  if number is not None}
            for key, (_, folder, own) in todo.items()}


def machines(todo, record):
    """The machines that the record names for {key: (flags, folder, measures)}, each once."""
    known = recorded(record)
    return sorted({known[folder.name, measure]["machine"] for _, folder, own in todo.values()
                   for measure in own if (folder.name, measure) in known})


def note(record, **line):
    """Add a line to the record, if there is one."""
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        with open(record, "a") as file:
            file.write(json.dumps(line) + "\n")
