"""Our side of a measuring process: start it, let it time, and turn what it refuses or how it dies into errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kind_edge import errors
from kind_edge.errors import GateError, KindEdgeError

_STDERR_CHARACTERS = 2000


class MeasuringProcess:
    """A fresh interpreter with this very package and one request (see `bench_worker`), for the length of a block.

    `answer()` waits for its next answer, `ask()` sends a number of runs, `finish()` lets it end and returns its last
    words. Each raises what the process refused, `GateError` if it was killed. Left by an error, the block kills it.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request

    def __enter__(self) -> Self:
        root = str(Path(__file__).resolve().parents[2])
        search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kind_edge.deploy.bench_worker", json.dumps(dict(self.request))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": search},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()
        self._stderr.close()

    @property
    def process_id(self) -> int:
        return self._process.pid

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer = dict(json.loads(line))
        if "error" in answer:
            kind = getattr(errors, answer["error"]["kind"], KindEdgeError)
            raise kind(answer["error"]["message"])
        return answer

    def ask(self, runs: int, untimed: int = 0) -> list[float]:
        """Latencies in milliseconds of so many single calls, after some that are not timed."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"runs": runs, "untimed": untimed}), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._death() from error
        return [float(value) for value in self.answer()["latencies_ms"]]

    def finish(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self.answer()
        self._process.wait()
        return answer

    def _death(self) -> KindEdgeError:
        code = self._process.wait()
        if code < 0:
            return GateError(
                f"{self.request['path']}: the measuring process was killed by signal {-code}; "
                "signal 9 mostly means that memory ran out"
            )
        self._stderr.seek(0)
        return KindEdgeError(f"the measuring process failed (exit {code}): {self._stderr.read()[-_STDERR_CHARACTERS:]}")
