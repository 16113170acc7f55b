"""The very same shared object under the oldest torch that is served and the newest: installs both, so not part of every run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.abi
@pytest.mark.parametrize("version", ["2.11.0", "newest"])
def test_contract_under(version, capfd):
    with capfd.disabled():
        subprocess.run([Path(__file__).parent / "abi.sh", version], check=True)
