"""What nvcc has made of the CUDA sources, in the object as built: no GPU is needed to see spills and narrow loads."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OBJECT = ROOT / "aliasfused" / "_C.abi3.so"
# Two blocks of 256 threads a multiprocessor: enough loads in flight, half of them would not be.
MOST_REGISTERS = 128


def find_tool(name: str) -> str:
    """A CUDA tool of CUDA_HOME, of the PATH or of an installed Python package; CI must have it."""
    places = [Path(os.environ["CUDA_HOME"], "bin", name)] if "CUDA_HOME" in os.environ else []
    places += [Path(found) for found in [shutil.which(name)] if found]
    for package, pattern in (("nvidia", f"*/bin/{name}"), ("triton", f"backends/nvidia/bin/{name}")):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            places += sorted(Path(folder).glob(pattern))
    found = next((str(place) for place in places if place.exists()), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {name} on this machine")
    return found


def architectures() -> tuple[str, ...]:
    """Those that setup.py builds for."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ARCHITECTURES":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py names no ARCHITECTURES")


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int  # where registers are spilled to, too

    @property
    def op(self) -> str:
        """The name of the function; in a mangled name its length stands ahead of it."""
        size, rest = re.fullmatch(r"_ZN10aliasfused(\d+)(\w+)", self.name).groups()
        return rest[: int(size)]


def dump(*options: str) -> str:
    command = [find_tool("cuobjdump"), *options, str(OBJECT)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """All of the object's; in CI it must have some."""
    report = dump("-res-usage")
    found = [
        Kernel(name, architecture, int(registers), int(stack))
        for architecture, functions in re.findall(r"arch = sm_(\d+)\n(.*?)(?=Fatbin|\Z)", report, re.DOTALL)
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", functions)
    ]
    if not found:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("the object was built without CUDA")
    return found


def of(kernels: list[Kernel], *ops: str) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.op in ops]


# How many kernels there are of an op in each architecture, at least.
FEWEST = {
    "blur_any": 12, "blur_down": 160, "blur_up": 36, "taps_grad": 4, "max_blur_any": 8, "max_blur_grad": 8,
    "max_blur_sums": 8, "max_up": 54, "sum_parts": 1, "moments_parts": 12, "moments_merge": 1, "batch_norm_channels": 2,
    "batch_norm_follow": 1, "adaptive_down": 16, "adaptive_up": 16, "adaptive_grad": 16,
}  # fmt: skip


def test_every_architecture_has_every_kernel(kernels):
    names = {arch: {k.name for k in kernels if k.architecture == arch} for arch in architectures()}
    first = next(iter(names.values()))
    assert all(found == first for found in names.values())
    for op, fewest in FEWEST.items():
        assert len(of(kernels, op)) >= fewest * len(names), op


def test_enough_blocks_fit(kernels):
    assert [k for k in kernels if k.registers > MOST_REGISTERS] == []


def test_nothing_leaves_the_registers(kernels):
    """But in the general kernels, which call functions, and around maxima, of which there is much to keep."""
    ops = FEWEST.keys() - {"blur_any", "max_blur_any", "max_blur_grad", "max_blur_sums"}
    spilled = [k for k in of(kernels, *ops) if k.stack]
    assert {k.op for k in spilled} <= {"max_up"} and max((k.stack for k in spilled), default=0) <= 136
    assert not [k for k in spilled if re.search(r"max_upI(f|6__half|13__nv_bfloat16)Li\d+ELi1E", k.name)]


def widest(kernel: str) -> bool:
    """Whether the lane in a mangled kernel name owns 16 bytes of channels, or rows of 16-byte packs."""
    lane = re.search(r"(Channels|RowDown|RowUp)I\w+?Li\d+ELi(\d+)E", kernel)
    assert lane, kernel
    return int(lane[2]) > 1


@pytest.fixture(scope="module")
def code(kernels) -> dict[str, str]:
    """The instructions of each kernel."""
    disassembly = dump("-sass", "-arch", "sm_90")
    return {text.split("\n", 1)[0].strip(): text for text in disassembly.split("Function : ")[1:]}


def test_packs_of_moments_are_read_16_bytes_at_once(code):
    packs = {name: text for name, text in code.items() if re.search(r"moments_partsI\w+?Li[248]E", name)}
    assert len(packs) == 8
    for name, text in packs.items():
        loads = re.findall(r"LDG\S*", text)
        # Four on their way at once, and those left over one by one.
        assert len(loads) > 4 and all("128" in load for load in loads), name


def test_packs_of_predicted_filters_move_16_bytes_at_once(code):
    """Of NHWC all of x, y and their gradients, for the usual filters; logits and theirs are numbers."""
    packs = {name: text for name, text in code.items() if re.search(r"adaptive_(down|up|grad)I\w+?Li[48]ELb1E", name)}
    assert len(packs) == 18
    for name, text in packs.items():
        assert "LDG.E.128" in text, name
        assert ("STG.E.128" in text) == ("adaptive_grad" not in name), name


def test_tuned_kernels_move_16_bytes_at_once(code):
    """Of the plain blur, and after activations."""
    tuned = {name: text for name, text in code.items() if re.search(r"\d+blur_(down|up)I\w+?\d(Channels|Row)", name)}
    wide = {name: text for name, text in tuned.items() if widest(name)}
    assert len(wide) > 70
    for name, text in wide.items():
        channels, adjoint = "8Channels" in name, "7blur_up" in name
        # Forward the large map is read, in the adjoint it is written; NHWC moves both in 16 bytes.
        assert (adjoint and not channels) or "LDG.E.128" in text, name
        assert (not adjoint and not channels) or "STG.E.128" in text, name


def test_rows_of_maxima_move_16_bytes_at_once(code):
    """In NCHW: forward all of x, for its gradient as much of x and dx as registers have room for."""
    down = {name: text for name, text in code.items() if "6MaxRow" in name}
    assert len(down) == 24
    assert all("LDG.E.128" in text for text in down.values())
    up = {name: text for name, text in code.items() if re.search(r"max_upIfLi[35]ELi[12]ELi1ELi4E", name)}
    assert len(up) == 4
    assert all("LDG.E.128" in text and "STG.E.128" in text for text in up.values())
