"""Makes or mends .venv; called by _env.sh when the stamp in it is not the wanted key. Standard library only.

The stamp `.ready` is written last, so an environment without it is never taken for ready. Until then `.unfinished`
marks the folder: if it is found at the start, an earlier run was killed half-way, and the folder is made anew. After a
failure that pip itself reported (it rolls back) the mark is taken off, and the next run goes on from there.
"""

from __future__ import annotations

import fcntl
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TORCH = "torch==2.13.0"
EXTRAS = "cpu,coreml,dev,optimum,train"


class SetupError(Exception):
    """Setting up cannot go on; the message says what to do."""


def say(text: str) -> None:
    print(f"kind-edge: {text}", file=sys.stderr, flush=True)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the one lock of this tree; a second run waits here until the first is done."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is setting up .venv; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


class Environment:
    """The folder .venv of one tree, worked on under the lock."""

    def __init__(self, root: Path, lock: int) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.stamp = self.folder / ".ready"
        self.unfinished = self.folder / ".unfinished"
        self._lock = lock

    def is_ready(self, key: str) -> bool:
        return self.stamp.is_file() and self.stamp.read_text().strip() == key and self._python_works()

    def prepare(self) -> None:
        """Leave a folder with a working python and pip, and without a stamp."""
        if self.folder.exists() and (self.unfinished.exists() or not self._python_works()):
            say("the earlier .venv is broken or half-made; making it anew")
            shutil.rmtree(self.folder)
        self.stamp.unlink(missing_ok=True)
        if self.folder.exists():
            say(f"bringing {self.folder} up to date with pyproject.toml and constraints.txt")
        else:
            say(f"setting up {self.folder} from constraints.txt: about 2 minutes and 1.9 GB, once")
            self.folder.mkdir()
            self.unfinished.touch()
            self._create()
        self.unfinished.touch()

    def _create(self) -> None:
        made = self._run([sys.executable, "-m", "venv", str(self.folder)], quiet=True)
        if made:
            return
        # Debian splits ensurepip off into python3-venv; a pip beside this Python can fill the gap.
        bare = self._run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(self.folder)])
        self.unfinished.touch()
        get_pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "-q", "pip"]
        if not (bare and self._run(get_pip)):
            raise SetupError(f"{sys.executable} can make no environment with pip; on Debian: apt install python3-venv")

    def pip(self, *arguments: str, quiet: bool = False) -> bool:
        common = ["--disable-pip-version-check", "--no-input", "-qq", "-c", str(self.root / "constraints.txt")]
        return self._run([str(self.python), "-m", "pip", "install", *common, *arguments], quiet=quiet)

    def finish(self, key: str) -> None:
        """Write the stamp: whole or not at all."""
        partial = self.stamp.with_suffix(".part")
        partial.write_text(key + "\n")
        self.unfinished.unlink()
        partial.replace(self.stamp)

    def _python_works(self) -> bool:
        check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
        return self.python.exists() and self._run([str(self.python), "-c", check], quiet=True)

    def _run(self, command: list[str], quiet: bool = False) -> bool:
        """Run a child that keeps the lock, should this process be killed before it; its output goes to stderr."""
        output = subprocess.DEVNULL if quiet else sys.stderr
        done = subprocess.run(command, stdout=output, stderr=output, pass_fds=(self._lock,), check=False)
        return done.returncode == 0


def install_torch(environment: Environment) -> None:
    """The CPU build where pip's configured sources have one."""
    if platform.system() == "Linux":
        if environment.pip(f"{TORCH}+cpu", quiet=True):
            return
        say(f"pip knows no CPU build of {TORCH}: the CUDA build is taken, several GB; CONTRIBUTING.md says more")
    if not environment.pip(TORCH):
        raise SetupError(f"pip could not install {TORCH}; its message is above")


def install(environment: Environment) -> None:
    say("installing PyTorch (1/2)")
    install_torch(environment)
    say("installing kind-edge, editable, and the other pinned packages (2/2)")
    if not environment.pip("setuptools"):
        raise SetupError("pip could not install setuptools; its message is above")
    if not environment.pip("--no-build-isolation", "-e", f"{environment.root}[{EXTRAS}]"):
        raise SetupError("pip could not install the pinned packages; its message is above. Mend it and run again")
    # Without torchvision: PyPI's does not load beside a CPU build of torch, and diffusers then fails with it.
    if not environment.pip("--no-deps", "torch-fidelity"):
        raise SetupError("pip could not install torch-fidelity; its message is above. Mend it and run again")


def main(root: Path, key: str) -> int:
    started = time.monotonic()
    with locked(root / "build" / ".setup.lock") as lock:
        environment = Environment(root, lock)
        if environment.is_ready(key):
            return 0
        try:
            environment.prepare()
            install(environment)
            environment.finish(key)
        except SetupError as error:
            environment.unfinished.unlink(missing_ok=True)
            say(f"setting up failed: {error}")
            return 1
        except OSError as error:
            say(f"setting up failed: {error}")
            return 1
    say(f"ready after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
