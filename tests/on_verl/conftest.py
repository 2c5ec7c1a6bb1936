"""Tests that need verl: `make test-verl` runs them in an environment of its own; elsewhere they are not collected."""

import importlib.util
import os

import pytest

# Before anything imports verl, here and in Ray's workers.
os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_cpu"}

if importlib.util.find_spec("verl") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def address():
    """Of a Ray cluster on this machine, which ends with the tests."""
    from verl_cpu.run import cluster

    with cluster() as found:
        yield found
