"""The bundled model and its data (README.md in this folder): where they lie, and the categories."""
from pathlib import Path

BUNDLED = Path(__file__).resolve().parent
CATEGORIES = ("math", "knowledge", "reasoning", "helpfulness")


def here(path):
    """A path that a run recorded; one into a bundled folder that has moved since, in this one."""
    _, found, inside = f"/{path}/".replace("\\", "/").rpartition("/lfu_min/bundled/")
    return str(BUNDLED / inside.strip("/")) if found and not Path(path).exists() else path
