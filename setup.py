"""Build the one shared object: C++ for CPUs, once per instruction set, and CUDA C++ where there is an nvcc."""

import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"baseline": []} | ({"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]} if X86 else {})
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
# The oldest torch whose stable ABI the object needs: 2.11.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, or of the nvidia-cuda-nvcc package."""
    found = [Path(os.environ["CUDA_HOME"], "bin/nvcc")] if "CUDA_HOME" in os.environ else []
    found += [Path(path) for path in [shutil.which("nvcc")] if path]
    package = find_spec("nvidia")
    for folder in package.submodule_search_locations or [] if package else []:
        found += sorted(Path(folder).glob("*/bin/nvcc"))
    return next((path.resolve() for path in found if path.exists()), None)


def cuda_home(nvcc: Path) -> Path:
    """The folder that holds nvcc's include/ and lib/, behind wrapper scripts and links."""
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = next(line.split("=", 1)[1] for line in listing.splitlines() if line.startswith("#$ TOP="))
    return Path(top.strip()).resolve()


class Build(BuildExtension):
    """Compiles what setuptools has no word for, and hands it over as objects."""

    def build_extensions(self) -> None:
        objects = Path(self.build_temp).resolve() / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        extension = self.extensions[0]
        compiler = os.environ.get("CXX", "c++")
        for isa, flags in ISAS.items():
            for source in sources("csrc/cpu/*.cpp"):
                if source.endswith("dispatch.cpp"):
                    continue
                out = objects / f"{Path(source).stem}.{isa}.o"
                self._compile([compiler, *CXX_FLAGS, *flags, f"-DAF_ISA={isa}", "-c", source, "-o", str(out)])
                extension.extra_objects.append(str(out))
        nvcc = None if os.environ.get("ALIASFUSED_NO_CUDA") else find_nvcc()
        if nvcc and sources("csrc/cuda/*.cu"):
            self._cuda(nvcc, objects, extension)
        super().build_extensions()

    def _cuda(self, nvcc: Path, objects: Path, extension) -> None:
        wanted = tuple(os.environ.get("ALIASFUSED_CUDA_ARCHITECTURES", " ".join(ARCHITECTURES)).split())
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
        codes.append(f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}")
        for source in sources("csrc/cuda/*.cu"):
            out = objects / f"{Path(source).stem}.cu.o"
            self._compile([str(nvcc), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda", "-Xcompiler=-fPIC,-fvisibility=hidden",
                           "--threads=0", *codes, "-c", source, "-o", str(out)])  # fmt: skip
            extension.extra_objects.append(str(out))
        home = cuda_home(nvcc)
        runtime = next(home.glob("**/libcudart_static.a"), None) or next(home.parent.glob("**/libcudart_static.a"))
        extension.include_dirs.append(str(home / "include"))
        # The stream getter lives in libtorch, where no symbol of ours is strong enough to keep it linked.
        extension.extra_link_args += [str(runtime), "-Wl,--no-as-needed", "-ltorch", "-lrt", "-lpthread", "-ldl"]
        names = " ".join(f"sm_{a}" for a in wanted)
        extension.define_macros += [("ALIASFUSED_CUDA", "1"), ("ALIASFUSED_CUDA_ARCHITECTURES", f'"{names}"')]

    def _compile(self, command: list[str]) -> None:
        """Run a compiler unless its output is newer than every source."""
        out = Path(command[-1])
        newest = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/**/*"), ROOT / "setup.py"] if path.is_file())
        if not out.exists() or out.stat().st_mtime < newest:
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True, cwd=ROOT)


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
