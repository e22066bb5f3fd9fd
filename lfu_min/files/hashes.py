"""SHA-256 of files: whether a model, data or an adapter still is what a run recorded.

Called by train.py for settings.json, --resume and --verify, by eval.py and paper/real.py. Verified
in tests/test_resume.py.
"""
import hashlib
from pathlib import Path

from .checkpoint import TOKENIZER_FILES, stored_weights
from .jsons import check_file

KEPT = {"special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"}
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def file_hash(path):
    """SHA-256 of a regular file as hex, read in pieces. Raises ValueError if it cannot be read."""
    check_file(path)
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                found.update(piece)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return found.hexdigest()


def model_files(folder):
    """Names of the files of a Hugging Face folder: configuration, weights, tokenizer."""
    folder = Path(folder)
    weights = sorted({file.name for file, _ in stored_weights(folder).values()})
    names = ["config.json", "model.safetensors.index.json", *TOKENIZER_FILES, *weights]
    return [name for name in names if (folder / name).is_file()]


def read_of_model(folder):
    """Those of model_files that are read here, and not just kept beside the others."""
    found = model_files(folder)
    instead = {"model.safetensors.index.json": "model.safetensors",  # which is read in its place
               "tokenizer.model": "tokenizer.json"}
    return [name for name in found if name not in KEPT and instead.get(name) not in found]


def model_hashes(folder):
    """{file name: SHA-256} of a Hugging Face folder's configuration, weights and tokenizer."""
    return hash_files(folder, model_files(folder))


def saved_files(folder):
    """Names of the files that a run saved: an adapter's, or those of a whole model."""
    return adapter_files(folder) or model_files(folder)


def read_of_run(folder):
    """Those of saved_files that are read."""
    return adapter_files(folder) or read_of_model(folder)


def adapter_files(folder):
    return [name for name in ADAPTER_FILES if (Path(folder) / name).is_file()]


def hash_files(folder, names):
    """{file name: SHA-256} of these files of a folder."""
    return {name: file_hash(Path(folder) / name) for name in names}


def changed(recorded, folder, read):
    """[(file name, what happened to it), ...] of the files in {file name: SHA-256} that are no
    longer what was recorded, or, if they all are, of those that would be read beside them.

    read: read_of_model, or read_of_run.
    """
    found = []
    for name, value in recorded.items():
        file = Path(folder) / name
        if not file.exists():
            found.append((name, "is gone"))
        elif file_hash(file) != value:
            found.append((name, "has changed"))
    return found or [(name, "has appeared") for name in read(folder) if name not in recorded]
