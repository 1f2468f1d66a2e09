"""How far a training of a study is, on standard error."""

from __future__ import annotations

import sys

from kind_edge.training.loop import Progress


def tell(progress: Progress, every: int = 100) -> None:
    if progress.step % every == 0:
        print(f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}", file=sys.stderr, flush=True)
