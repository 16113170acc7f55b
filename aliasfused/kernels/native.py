"""The C++ and CUDA kernels: one shared object that registers itself with the dispatcher when it is imported."""

from __future__ import annotations

_BUILD = "Build it with: pip install --no-build-isolation -e ."

try:
    from aliasfused import _C

    _INFO: dict[str, str] = dict(item.split("=", 1) for item in _C.info().split(";"))
    _ERROR = ""
except ImportError as error:
    _INFO, _ERROR = {}, f"its shared object could not be loaded ({error})"
    if "ALIASFUSED_CPU_ISA" in str(error):
        _BUILD = "Unset the environment variable ALIASFUSED_CPU_ISA, or name an instruction set that this processor has"


def status(device: str) -> tuple[str, str, str]:
    """Detail (instruction sets, architectures), reason why not, remedy."""
    if _ERROR:
        return "", _ERROR, _BUILD
    detail = _INFO[device]
    if not detail:
        return (
            "",
            "this build has no CUDA kernels (there was no nvcc when it was built, or ALIASFUSED_NO_CUDA was set)",
            f"Install nvcc and build again. {_BUILD}",
        )
    return detail, "", ""
