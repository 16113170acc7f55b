"""Everything is in its room: where the parts of an op are found and who includes whom (imports: test_lint.py)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aliasfused"
CSRC = ROOT / "csrc"
NOT_ROOMS = {"__init__", "decompositions", "bn_blur_pool"}  # have no kernels of their own
PARTS = (
    "aliasfused/ops/{}.py",
    "aliasfused/kernels/triton/{}.py",
    "csrc/{}.h",
    "csrc/{}.cpp",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.h",
    "csrc/cuda/{}.cuh",
    "csrc/cuda/{}.cu",
)
SHARED = {"csrc/cpu/dispatch.cpp", "csrc/module.cpp"}
MODULES = sorted(PACKAGE.rglob("*.py"))
# Lines. What is longer is asked about, not refused: is it one thing?
BUDGETS = {
    "aliasfused/ops/*.py": 120,
    "aliasfused/kernels/**/*.py": 250,
    "csrc/cpu/*": 250,
    "csrc/cuda/*": 250,
    "setup.py": 110,
}


def rooms() -> list[str]:
    files = (PACKAGE / "ops").glob("*.py")
    return sorted(f.stem for f in files if f.stem not in NOT_ROOMS and not f.stem.startswith("_"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("room", rooms())
def test_an_op_has_all_its_parts_under_its_name(room):
    assert [part for part in PARTS if not (ROOT / part.format(room)).exists()] == []


def test_no_kernel_is_without_a_room():
    """A room's sources have its name, and behind it perhaps that of a part."""
    files = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp"), *CSRC.glob("cuda/*.cu")]
    stems = {f.stem for f in files if named(f) not in SHARED}
    assert set(rooms()) <= stems
    assert [s for s in stems if not any(s == room or s.startswith(f"{room}_") for room in rooms())] == []


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_what_is_public_is_documented(module):
    tree = ast.parse(module.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), "the module says nothing of itself"
    public = {
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        for name in ast.literal_eval(node.value)
    }
    defined = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public]
    assert [node.name for node in defined if not ast.get_docstring(node)] == []


def includes(path: Path, seen: dict[Path, set[str]]) -> dict[Path, set[str]]:
    """Of a source and of all that it includes of ours: the headers named in angle brackets."""
    if path not in seen:
        text = path.read_text()
        seen[path] = set(re.findall(r"^#\s*include\s*<(.+)>", text, re.MULTILINE))
        for name in re.findall(r'^#\s*include\s*"(.+)"', text, re.MULTILINE):
            found = [folder / name for folder in (path.parent, CSRC) if (folder / name).exists()]
            assert found, f"{named(path)} includes {name}, which is not there"
            includes(found[0].resolve(), seen)
    return seen


@pytest.mark.parametrize("room", rooms())
def test_kernels_are_plain_code(room):
    """nvcc, g++ and the emulation compile them without torch; the index arithmetic without CUDA either."""
    seen: dict[Path, set[str]] = {}
    for source in (CSRC / "cpu" / f"{room}.cpp", *(CSRC / "cuda").glob(f"{room}*.cu")):
        includes(source, seen)
    assert [
        named(f) for f, headers in seen.items() if any(h.startswith(("torch", "ATen", "c10")) for h in headers)
    ] == []
    plain = includes(CSRC / f"{room}.h", {})
    assert [named(f) for f, headers in plain.items() if any("cuda" in h for h in headers)] == []


def test_only_a_few_headers_know_torch():
    knowing = {named(f) for f in CSRC.rglob("*.h") if "#include <torch/" in f.read_text()}
    assert knowing <= {"csrc/tensor.h", "csrc/cuda/device.h"}


def test_budgets(capsys):
    """Never fails; what is over its budget is printed."""
    over = [
        f"{named(path)} has {lines} lines, its budget is {budget}"
        for pattern, budget in BUDGETS.items()
        for path in sorted(ROOT.glob(pattern))
        if path.is_file() and (lines := len(path.read_text().splitlines())) > budget
    ]
    if over:
        with capsys.disabled():
            print("", *over, sep="\n  ", end=" ")
