"""Where the user keeps what can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_base() -> Path:
    """The user's cache: ${XDG_CACHE_HOME:-~/.cache}/kind-edge."""
    return Path(os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")) / "kind-edge"
