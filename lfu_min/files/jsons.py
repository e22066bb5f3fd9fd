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
    return decoded(read_bytes(path), path, encoding=encoding)


def decoded(raw, path, line=1, encoding="utf-8-sig"):
    """Bytes that begin on `line` of the file `path` as text. Raises ValueError naming the line that
    is not UTF-8."""
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line += raw[:error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; save "
                         "the file as UTF-8") from None


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
    return list(each_record(path))


def each_record(path):
    """read_records one after the other: of a .jsonl file no more than a line is in memory."""
    suffix, where = Path(path).suffix.lower(), None
    if suffix not in (".json", ".jsonl"):
        check_file(path)
        raise ValueError(f"{path}: a .json or .jsonl file is needed")
    for where, value in (each_item if suffix == ".json" else each_line)(path):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: an object is needed, not {json_type(value)}")
        yield where, value
    if where is None:
        raise ValueError(f"{path} is empty" if suffix == ".jsonl" else f"{path}: the list is empty")


def each_item(path):
    """("FILE, item 1", value), ... of a .json file with a list."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    values = parse_hinting(text, path, 1, "if it has one object a line, name it .jsonl")
    if not isinstance(values, list):
        raise ValueError(f"{path}: a list of objects is needed, not {json_type(values)}")
    del text
    for i in range(len(values)):
        value, values[i] = values[i], None  # lets go of it
        yield f"{path}, item {i + 1}", value


def each_line(path):
    """("FILE, line 1", value), ... of a .jsonl file. Only "\\n" ends a line: U+2028 and the like
    may be in JSON."""
    check_file(path)
    try:
        with open(path, "rb") as lines:
            for i, raw in enumerate(lines, 1):
                text = decoded(raw.rstrip(b"\n"), path, i, "utf-8-sig" if i == 1 else "utf-8")
                if text.strip():
                    yield f"{path}, line {i}", parse_hinting(text, path, i, "a .jsonl file has "
                                                             "one object a line")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def parse_hinting(text, path, line, hint):
    """parse_json, with a hint behind its error."""
    try:
        return parse_json(text, path, line)
    except ValueError as error:
        raise ValueError(f"{error}; {hint}") from None


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


def check_output(flag, path):
    """Raise ValueError before anything slow starts, where no file can be written later: `path` is
    no regular file, its folder does not exist, or one of them is read-only."""
    path, folder = Path(path), Path(path).absolute().parent
    if path.exists() and not path.is_file():
        raise ValueError(f"{flag} {path} is {'a folder' if path.is_dir() else 'no regular file'}")
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: the folder {path.parent} does not exist")
    if not all(os.access(there, os.W_OK) for there in (folder, path) if there.exists()):
        raise ValueError(f"{flag} {path} cannot be written: it or its folder is read-only")


def finite(value):
    """The same value with None for every float that JSON has no word for: NaN, inf and -inf."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path, text):
    """Write a file as a whole; after an error an older one is still there. ValueErrors as
    write_json's."""
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` as indented JSON, floats that are not finite as null.

    Raises ValueError if the file cannot be written; an older one is then still whole.
    """
    text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    with written_aside(path) as temporary:  # a lone surrogate becomes its JSON escape, \ud800
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
