"""Compiles the CUDA sources with g++ against the stand-in headers beside this file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILE = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
]
INCLUDE = [f"-I{HERE}", f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "aliasfused" / "emulation"


def build(name: str, own_source: str, *flags: str) -> Path:
    """``name`` from all CUDA sources and one of our own, unless it was built from these very texts before."""
    texts = sorted(p for p in [*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir(), *HERE.iterdir()] if p.is_file())
    compiler = os.environ.get("CXX", "g++")
    recipe = "\0".join([name, compiler, *COMPILE, *INCLUDE, *flags]).encode()
    key = hashlib.sha256(b"\0".join([recipe, *(p.read_bytes() for p in texts)])).hexdigest()[:16]
    folder = _cache() / key
    out = folder / name
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / own_source]
        objects = [folder / f"{name}.{source.stem}.{os.getpid()}.o" for source in sources]

        def compiled(source: Path, out: Path) -> None:
            command = [compiler, *COMPILE, *INCLUDE, *flags, "-x", "c++", "-c", str(source), "-o", str(out)]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compiled, sources, objects))
        # Linked under another name first: another process may be looking for the finished file.
        fresh = folder / f"{name}.{os.getpid()}"
        subprocess.run([compiler, *flags, *map(str, objects), "-o", str(fresh)], check=True)
        fresh.replace(out)
        for file in objects:
            file.unlink()
    return out
