"""The Triton backend where there is no GPU: its kernels interpreted, and compiled ahead of time.

Triton decides when it is imported whether it interprets, so each half has a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(("worker", "interpret"), [("interpret", "1"), ("interpret_adaptive", "1"), ("compile", "0")])
def test_triton(worker, interpret, capfd):
    if importlib.util.find_spec("triton") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("triton is not installed, and CI has to test it: pip install triton")
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "triton" / f"{worker}.py"]
    environment = os.environ | {
        "TRITON_INTERPRET": interpret,
        "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path),
    }
    run = subprocess.run(
        command, env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with capfd.disabled():
        print(f"\n  {worker}.py: {run.stdout.strip().splitlines()[-1]}", end=" ")
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout, run.stdout
