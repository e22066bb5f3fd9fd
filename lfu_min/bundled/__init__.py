"""The bundled model and its data (README.md in this folder): where they lie, and the categories."""
from pathlib import Path

BUNDLED = Path(__file__).resolve().parent
CATEGORIES = ("math", "knowledge", "reasoning", "helpfulness")
