"""Text and JSON files, read and written in one way by everything else.

Errors are a ValueError of one line that names the file and, in JSON, the line. A file is written
beside the old one and takes its place when it is whole. Verified in tests/test_data.py.
"""
from contextlib import contextmanager, suppress
import errno
import json
import math
import os
from pathlib import Path
import stat

LEVELS = 100  # of lists and objects in one another: what is deeper is no file of ours


def check_file(path):
    """Raise ValueError unless `path` is a regular file: opening a FIFO would wait forever."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL or half a character, which an index may hold
        raise ValueError(f"{shown(str(path))} is not the name of a file") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'a FIFO or a device'}, "
                         "not a file")


def read_bytes(path):
    """The bytes of a regular file. Raises ValueError if it cannot be read."""
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path, encoding="utf-8-sig"):
    """The text of a regular file. -sig: Windows programs like to put a BOM in front; leave it out.

    Raises ValueError if the file cannot be read, or naming the line that is not UTF-8.
    """
    try:
        return read_bytes(path).decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: byte {error.object[error.start]:#04x} is not "
                         "UTF-8; save the file as UTF-8") from None


def parse_json(text, where, line=1):
    """The value in a JSON text that begins on `line` of the file `where`.

    Raises ValueError that starts with `where` and the number of the line with the mistake.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {line + error.lineno - 1}: not valid JSON ({error.msg} at "
                         f"column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless [[[[
        raise ValueError(f"{where}, line {line}: not usable JSON ({error})") from None
    if nested(value, LEVELS):
        raise ValueError(f"{where}, line {line}: not usable JSON (lists and objects in one "
                         f"another, more than {LEVELS} deep)")
    return value


def nested(value, most):
    """Whether lists and objects are more than `most` deep in one another."""
    level = [value]
    for _ in range(most + 1):
        level = [item for outer in level if isinstance(outer, (dict, list))
                 for item in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return True


def read_json(path):
    """The object in a JSON file. Raises ValueError naming the file, and the line that is broken."""
    if not os.path.exists(path):
        raise ValueError(f"{path} is missing")
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not {json_type(value)}")
    return value


def read_records(path):
    """The objects in a .json file (a list) or a .jsonl file (one a line) -> [(where, dict), ...].

    where says "FILE, item 3" or "FILE, line 3", counted from 1, for the caller's own messages.
    Blank lines are skipped. Raises ValueError naming the first thing that is wrong, also if there
    is no object at all.
    """
    text, suffix = read_text(path), Path(path).suffix.lower()
    if suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: a .json or .jsonl file is needed")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    hint = ("if it has one object a line, name it .jsonl" if suffix == ".json"
            else "a .jsonl file has one object a line")
    try:
        if suffix == ".json":
            values = parse_json(text, path)
        else:  # only "\n" ends a line: U+2028 and the like may be in JSON
            values = {f"{path}, line {i}": parse_json(line, path, i)
                      for i, line in enumerate(text.split("\n"), 1) if line.strip()}
    except ValueError as error:
        raise ValueError(f"{error}; {hint}") from None
    if isinstance(values, list):
        values = {f"{path}, item {i}": value for i, value in enumerate(values, 1)}
    elif suffix == ".json":
        raise ValueError(f"{path}: a list of objects is needed, not {json_type(values)}")
    if not values:
        raise ValueError(f"{path}: the list is empty")
    for where, value in values.items():
        if not isinstance(value, dict):
            raise ValueError(f"{where}: an object is needed, not {json_type(value)}")
    return list(values.items())


def short(value, most=60):
    """A value out of a file, for a message: Python's repr, cut."""
    text = repr(value)
    return text if len(text) <= most else text[:most - 3] + "..."


def shown(text, most=120):
    """A name out of a file, for a message: as it is, or cut and quoted if it is odd."""
    return text if text.isprintable() and len(text) <= most else short(text, most)


def json_type(value):
    """What JSON calls a value's type, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false",
             type(None): "null"}
    return names.get(type(value), "a number")


def to_disk(path):
    """Wait until what was written to a file, or the names in a folder, would outlive a power cut.
    Raises OSError, but not where the file system cannot do that."""
    if os.name == "nt":
        return  # there a file would have to be open for writing, and no folder can be
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def written_aside(path):
    """A temporary path to write to, which takes the place of `path` at the end of the block.

    After an error the older file is still whole. Raises ValueError if writing fails (full disk).
    """
    if os.path.exists(path):
        check_file(path)  # os.replace would put a file in place of /dev/null
    path = Path(os.path.realpath(path))  # of a link, the file it points to is replaced
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as umask says; safetensors' own is 0600
        yield temporary
        temporary.chmod(mode)
        to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def finite(value):
    """The same value with None for every float that JSON has no word for: NaN, inf and -inf."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write `value` as indented JSON, floats that are not finite as null.

    Raises ValueError if the file cannot be written; an older one is then still whole.
    """
    text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    with written_aside(path) as temporary:  # a lone surrogate becomes its JSON escape, \ud800
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
