"""The sources as their tools want them: ``make format`` mends most of what fails here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = sorted(
    str(path.relative_to(ROOT))
    for folder in ("csrc", "tests/emulation")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".h", ".cpp", ".cu", ".cuh")
)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        pytest.param("ruff", ["check", "."], id="ruff"),
        pytest.param("ruff", ["format", "--check", "."], id="ruff-format"),
        pytest.param("mypy", [], id="mypy"),
        pytest.param("clang-format", ["--dry-run", "--Werror", *CXX], id="clang-format"),
        pytest.param("lint-imports", ["--no-logo", "--no-cache"], id="import-linter"),
    ],
)
def test_lint(tool, arguments):
    found = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{tool} is not installed")
    run = subprocess.run([found, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
