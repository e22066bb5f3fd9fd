"""One run of train.py and what is measured of it, kept in a folder so that nothing is done twice.

    FOLDER/run/             train.py's run
    FOLDER/trained          there once it has ended: how many seconds its steps took
    FOLDER/<measure>.json   {column: number} of a measure

Used by sweep.py, reproduce.py and real.py.
"""
from concurrent.futures import ProcessPoolExecutor
import contextlib
import importlib.util
import json
import multiprocessing
import shutil
import sys
import time

import torch

from ..engine import system
from ..files import jsons


def train_script():
    """train.py as a module: it lies in the repository, beside the package."""
    path = system.ROOT / "train.py"
    if not path.is_file():
        raise ValueError(f"{path} is missing: a sweep needs the repository, not the package alone")
    spec = importlib.util.spec_from_file_location("train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data_file(file, rows):
    """`file` with these records, one a line; written, as a whole, unless it is there."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with jsons.written_aside(file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def as_flags(setting):
    """{"lr": "1e-3"} -> ["--lr", "1e-3"]"""
    return [part for name, value in setting.items() for part in (f"--{name}", str(value))]


def trained(flags, folder):
    """The run folder of train.py with these flags, made unless it is there. What an interrupted run
    left is gone on with from its last checkpoint."""
    run, mark = folder / "run", folder / "trained"
    if not mark.is_file():
        how = ["--resume", str(run)]
        if not any((run / "checkpoints").glob("step-*")):
            shutil.rmtree(run, ignore_errors=True)
            how = [*as_flags(flags), "--out", str(run)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a") as text, contextlib.redirect_stdout(text):
            train_script().main(how)
        records = [record for _, record in jsons.read_records(run / "log.jsonl")]
        mark.write_text(f"{sum(r['ms'] for r in records) / 1000:.1f}\n")
    return run


def there(flags, folder, measures):
    """Whether nothing is left to do."""
    return all((folder / f"{name}.json").is_file() for name in measures)


def measured(flags, folder, measures, threads=1):
    """{column: number} of all measures, {name: function(run folder, or None for the base)}, of
    one run; flags None: of the base. Only what is not there is trained and measured."""
    torch.set_num_threads(threads)
    found = {}
    for name, measure in measures.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            run = None if flags is None else trained(flags, folder)
            folder.mkdir(parents=True, exist_ok=True)
            jsons.write_json(file, measure(run))
        found |= jsons.read_json(file)
    return found


def all_measured(todo, jobs, threads=1, name=lambda key: key):
    """{key: {column: number}} of {key: (flags, folder, measures)}, `jobs` at one time, each in a
    process of its own; a line a new result on the standard error."""
    started, own = time.time(), torch.get_num_threads()
    found = {key: measured(*job, own) for key, job in todo.items() if there(*job)}
    todo = {key: job for key, job in todo.items() if key not in found}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {key: pool.submit(measured, *job, threads) for key, job in todo.items()}
        try:
            for i, (key, job) in enumerate(pending.items(), 1):
                found[key] = job.result()
                eta = system.duration((time.time() - started) / i * (len(todo) - i))
                print(f"{i}/{len(todo)}  {name(key)}  ETA {eta}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found
