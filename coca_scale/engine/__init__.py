"""Sharding, stepping, checkpoints: of it zero*.py and launch.py know DeepSpeed."""

import os

# torch reads it while it is imported. That the store of a job is gone is told by the watchdog, in a
# line; torch's own warnings about it are a page of C++ frames each.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
