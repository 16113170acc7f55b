"""What nvcc makes of the CUDA sources, for every architecture: no GPU is needed to see spills and narrow loads."""

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


def code_options(wanted: tuple[str, ...]) -> list[str]:
    """One front-end pass for all architectures that know the same instructions: 16-bit floats came with 8.0."""
    groups: dict[str, list[str]] = {}
    for arch in wanted:
        groups.setdefault("75" if int(arch) < 80 else "80" if int(arch) < 90 else "90", []).append(f"sm_{arch}")
    return [f"-gencode=arch=compute_{virtual},code=[{','.join(real)}]" for virtual, real in groups.items()]


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int
    spills: int

    @property
    def tuned(self) -> bool:
        return re.search(r"\d+blur_(down|up)I", self.name) is not None


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[str, tuple[Path, list[Kernel]]]:
    """Of every source: the object, and what ptxas tells of its kernels."""
    folder = tmp_path_factory.mktemp("cuda")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda", "-Xptxas", "-v", "-fatbin"]
    report = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = {}
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        out = folder / f"{source.stem}.fatbin"
        command = [find_tool("nvcc"), *flags, *code_options(architectures()), str(source), "-o", str(out)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found[source.stem] = (
            out,
            [
                Kernel(name, arch, int(used), int(stack), int(spills))
                for name, arch, stack, spills, used in report.findall(result.stderr)
            ],
        )
    return found


# How many kernels a source has, at least.
@pytest.mark.parametrize(
    ("source", "fewest"),
    [("blur_pool", 100), ("max_blur_pool", 24), ("channel_moments", 13), ("batch_norm", 3), ("adaptive_blur_pool", 48)],
)
def test_every_architecture_has_every_kernel(compiled, source, fewest):
    kernels = compiled[source][1]
    names = {arch: {k.name for k in kernels if k.architecture == arch} for arch in architectures()}
    first = next(iter(names.values()))
    assert len(first) >= fewest
    assert all(found == first for found in names.values())


def test_tuned_kernels_stay_in_registers(compiled):
    tuned = [k for k in compiled["blur_pool"][1] if k.tuned]
    assert len(tuned) > 100 * len(architectures())
    assert [k for k in tuned if k.stack or k.spills or k.registers > MOST_REGISTERS] == []


def test_kernels_with_a_prologue_leave_room(compiled):
    """They call functions, around which registers may be saved; but as many blocks as of others must fit."""
    assert [k for k in compiled["max_blur_pool"][1] if k.registers > MOST_REGISTERS] == []


def test_kernels_of_moments_stay_in_registers(compiled):
    assert [k for k in compiled["channel_moments"][1] if k.stack or k.spills or k.registers > MOST_REGISTERS] == []


def test_kernels_of_batch_norms_stay_in_registers(compiled):
    assert [k for k in compiled["batch_norm"][1] if k.stack or k.spills or k.registers > MOST_REGISTERS] == []


def test_kernels_of_predicted_filters_stay_in_registers(compiled):
    assert [k for k in compiled["adaptive_blur_pool"][1] if k.stack or k.spills or k.registers > MOST_REGISTERS] == []


def widest(kernel: str) -> bool:
    """Whether the lane in a mangled kernel name owns 16 bytes of channels, or rows of 16-byte packs."""
    lane = re.search(r"(Channels|RowDown|RowUp)I\w+?Li\d+ELi(\d+)E", kernel)
    assert lane, kernel
    return int(lane[2]) > 1


def functions(fatbin: Path) -> dict[str, str]:
    """The instructions of each kernel."""
    command = [find_tool("cuobjdump"), "-sass", "-arch", "sm_90", str(fatbin)]
    disassembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {text.split("\n", 1)[0].strip(): text for text in disassembly.split("Function : ")[1:]}


def test_packs_of_moments_are_read_16_bytes_at_once(compiled):
    code = functions(compiled["channel_moments"][0])
    packs = {name: text for name, text in code.items() if re.search(r"moments_partsI\w+?Li[248]E", name)}
    assert len(packs) == 8
    for name, text in packs.items():
        loads = re.findall(r"LDG\S*", text)
        # Four on their way at once, and those left over one by one.
        assert len(loads) > 4 and all("128" in load for load in loads), name


def test_packs_of_predicted_filters_move_16_bytes_at_once(compiled):
    """Of NHWC all of x, y and their gradients, for the usual filters; logits and theirs are numbers."""
    code = functions(compiled["adaptive_blur_pool"][0])
    packs = {name: text for name, text in code.items() if re.search(r"adaptive_(down|up|grad)I\w+?Li[48]ELb1E", name)}
    assert len(packs) == 18
    for name, text in packs.items():
        assert "LDG.E.128" in text, name
        assert ("STG.E.128" in text) == ("adaptive_grad" not in name), name
        assert "LDL" not in text and "STL" not in text, name


def test_tuned_kernels_move_16_bytes_at_once(compiled):
    code = functions(compiled["blur_pool"][0])
    tuned = {name: text for name, text in code.items() if re.search(r"\d+blur_(down|up)I", name)}
    wide = {name: text for name, text in tuned.items() if widest(name)}
    assert 2 * len(wide) == len(tuned) > 100
    for name, text in wide.items():
        channels, adjoint = "8Channels" in name, "7blur_up" in name
        # Forward the large map is read, in the adjoint it is written; NHWC moves both in 16 bytes.
        assert (adjoint and not channels) or "LDG.E.128" in text, name
        assert (not adjoint and not channels) or "STG.E.128" in text, name
        assert "LDL" not in text and "STL" not in text, name
