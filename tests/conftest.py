"""What holds for every test: one thread per process, and no deadlines on shared cores."""

import os

# Before anything imports torch or ONNX Runtime: test processes with a pool of threads each only fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("kind-edge", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("kind-edge")
