"""docs/cli.md is what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_of_the_command_line_is_fresh() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "_reference.py"))["reference"]()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made, "make it anew with: scripts/reference"
