"""Tests that need verl: `make test-verl` runs them in an environment of its own; elsewhere they are not collected."""

import importlib.util

if importlib.util.find_spec("verl") is None:
    collect_ignore_glob = ["test_*.py"]
