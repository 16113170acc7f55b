"""Build the one shared object: C++ for CPUs, once per instruction set, and CUDA C++ where there is an nvcc.

ALIASFUSED_NO_CUDA=1 leaves CUDA out; ALIASFUSED_CUDA_ARCHITECTURES="80 90" builds for these alone. CUDA_HOME, CXX and
MAX_JOBS (compilers at work at once) mean what they mean elsewhere.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
V3, V4 = ["-march=x86-64-v3", "-mprfchw"], ["-march=x86-64-v4", "-mprfchw"]
X86_ISAS = {"avx2": V3, "avx512": V4, "avx512bf16": [*V4, "-mavx512bf16"]}
ISAS = {"baseline": []} | (X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {})
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
CU_FLAGS = ["-std=c++17", "-O3", "-expt-relaxed-constexpr", "-extended-lambda", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# The oldest torch whose stable ABI the object needs: 2.11.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, else of the nvidia-cuda-nvcc package, else of the PATH."""
    found = [Path(os.environ["CUDA_HOME"], "bin/nvcc")] if "CUDA_HOME" in os.environ else []
    package = find_spec("nvidia")
    for folder in package.submodule_search_locations or [] if package else []:
        found += sorted(Path(folder).glob("*/bin/nvcc"))
    found += [Path(path) for path in [shutil.which("nvcc")] if path]
    return next((path.resolve() for path in found if path.exists()), None)


def cuda_home(nvcc: Path) -> Path:
    """The folder that holds nvcc's include/ and lib/, behind wrapper scripts and links."""
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = next(line.split("=", 1)[1] for line in listing.splitlines() if line.startswith("#$ TOP="))
    return Path(top.strip()).resolve()


def code_options(wanted: list[str]) -> list[str]:
    """One front-end pass for all architectures that know the same instructions; the last also serves those to come."""
    groups: dict[int, list[str]] = {}
    for arch in sorted(map(int, wanted)):
        groups.setdefault(75 if arch < 80 else 80 if arch < 90 else 90, []).append(f"sm_{arch}")
    newest = max(groups)
    groups[newest].append(f"compute_{newest}")
    return [f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]" for virtual, codes in groups.items()]


class Build(BuildExtension):
    """Compiles what setuptools has no word for, and hands it over as objects."""

    def build_extensions(self) -> None:
        extension = self.extensions[0]
        nvcc = None if os.environ.get("ALIASFUSED_NO_CUDA") else find_nvcc()
        jobs = self._cuda(nvcc, extension) if nvcc else []
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        for source in sources("csrc/cpu/*.cpp"):
            for isa, flags in ISAS.items() if not source.endswith("dispatch.cpp") else ():
                jobs.append([*compiler, *CXX_FLAGS, *flags, f"-DAF_ISA={isa}", "-c", source])
        with ThreadPoolExecutor(JOBS) as pool:
            extension.extra_objects += pool.map(compiled, jobs)
        super().build_extensions()

    def _cuda(self, nvcc: Path, extension: Extension) -> list[list[str]]:
        wanted = os.environ.get("ALIASFUSED_CUDA_ARCHITECTURES", "").split() or list(ARCHITECTURES)
        home = cuda_home(nvcc)
        runtime = next(home.glob("**/libcudart_static.a"), None) or next(home.parent.glob("**/libcudart_static.a"))
        extension.include_dirs.append(str(home / "include"))
        # The stream getter lives in libtorch, where no symbol of ours is strong enough to keep it linked.
        extension.extra_link_args += [str(runtime), "-Wl,--no-as-needed", "-ltorch", "-lrt", "-lpthread", "-ldl"]
        names = " ".join(f"sm_{arch}" for arch in wanted)
        extension.define_macros += [("ALIASFUSED_CUDA", "1"), ("ALIASFUSED_CUDA_ARCHITECTURES", f'"{names}"')]
        options = [*CU_FLAGS, *code_options(wanted), f"--threads={JOBS}"]
        return [[str(nvcc), *options, "-c", source] for source in sources("csrc/cuda/*.cu")]


def compiled(command: list[str]) -> str:
    """Run a compiler on its last argument, unless this very command has run on these very texts; the object's path."""
    texts = sorted([*ROOT.glob("csrc/*.h"), *(ROOT / command[-1]).parent.iterdir()])
    key = hashlib.sha256(b"\0".join([*map(str.encode, command), *(path.read_bytes() for path in texts)])).hexdigest()
    out = ROOT / "build" / "objects" / f"{Path(command[-1]).stem}.{key[:16]}.o"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_suffix(f".{os.getpid()}.o")
        print(shlex.join(command), flush=True)
        subprocess.run([*command, "-o", str(fresh)], check=True, cwd=ROOT)
        fresh.replace(out)  # whole or not at all, whoever interrupts
    return str(out)


setup(
    ext_modules=[
        CppExtension(
            "aliasfused._C",
            [*sources("csrc/*.cpp"), "csrc/cpu/dispatch.cpp"],
            extra_compile_args=[*CXX_FLAGS, *ABI_FLAGS],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
