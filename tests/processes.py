"""Child processes that import what the tests' own process does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """Environment of a child: this tree, `folders` and this process's own path, and `variables` on top of this process's.

    The path is passed on because packages may lie where only this process looks (``pip install --target``, PYTHONPATH).
    """
    path = [*map(str, folders), str(ROOT), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
