"""Builds the wheel, unpacks it, and compares its files with the tree's: what pyproject.toml does not list shows here.

Usage: _check_wheel.py ROOT WORK; afterwards WORK/installed holds the unpacked wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

IGNORED_PARTS = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def build_wheel(root: Path, work: Path) -> Path:
    """Build from a clean slate: setuptools would ship files that only an earlier build/lib still holds."""
    shutil.rmtree(root / "build" / "lib", ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the wheel cannot be built:\n{done.stdout}{done.stderr}")
    (wheel,) = work.glob("*.whl")
    return wheel


def files_of_tree(root: Path) -> set[str]:
    """Where each file of the package folders has to lie in the wheel, by the package-dir of pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {folder: package.replace(".", "/") for package, folder in settings["package-dir"].items()}
    found = set()
    for top in {PurePosixPath(folder).parts[0] for folder in folders}:
        for path in (root / top).rglob("*"):
            relative = PurePosixPath(path.relative_to(root).as_posix())
            if path.is_dir() or IGNORED_PARTS.intersection(relative.parts):
                continue
            folder = max((f for f in folders if relative.is_relative_to(f)), key=len)
            found.add(str(PurePosixPath(folders[folder]) / relative.relative_to(folder)))
    return found


def files_of_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/") and ".dist-info/" not in name}


def main(root: Path, work: Path) -> int:
    wheel = build_wheel(root, work)
    tree, shipped = files_of_tree(root), files_of_wheel(wheel)
    for name in sorted(tree - shipped):
        print(f"{name}: in the tree, not in the wheel; list its package or package-data in pyproject.toml")
    for name in sorted(shipped - tree):
        print(f"{name}: in the wheel, not in the tree")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "installed")
    print(f"{wheel.name}: {len(shipped)} files, {wheel.stat().st_size / 1e6:.1f} MB")
    return int(tree != shipped)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
