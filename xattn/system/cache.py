"""The user's cache folder, where xattn keeps what it can make again. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the folder of that name among xattn's; it may not exist yet, or not be writable.

    It is below ``~/.cache`` on every system, as docs/ says. platformdirs would move it on macOS.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "xattn" / name
