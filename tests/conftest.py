"""Set-up shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter

import pytest
import torch

# torchvision (which timm imports) expects these on a torch without its compiled ops.
_torchvision = torch.library.Library("torchvision", "DEF")
_torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# Packages without which tests skip themselves; CI has them all.
OPTIONAL = ("timm", "kornia", "onnxruntime", "onnxscript", "psutil", "rich", "typer", "matplotlib")

NOT_EVERY_RUN = {
    "large": "needs several GB of memory",
    "abi": "installs other versions of torch",
}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the contract test's tensors are")


def pytest_configure(config):
    for name, reason in NOT_EVERY_RUN.items():
        config.addinivalue_line("markers", f"{name}: {reason}; run it with -m {name}")
    if not config.option.markexpr:
        config.option.markexpr = " and ".join(f"not {name}" for name in NOT_EVERY_RUN)


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("device")


def _skip_reasons(config) -> Counter:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return Counter(str(r.longrepr[2] if isinstance(r.longrepr, tuple) else r.longrepr) for r in reports)


def _absent(config) -> list[str]:
    """What a complete machine has: the backends of the device, triton as a package, and what the tests compare with."""
    device = config.getoption("device")
    wanted = [f"backend {name} on {device}:" for name in ("native", "reference", *["triton"] * (device == "cuda"))]
    wanted.append("triton is not installed")
    skipped = [reason for reason in _skip_reasons(config) if any(text in reason for text in wanted)]
    return skipped + [f"{name} is not installed" for name in OPTIONAL if importlib.util.find_spec(name) is None]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if os.environ.get("CI") == "true" and not session.exitstatus and _absent(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    reasons = _skip_reasons(config)
    if reasons:
        terminalreporter.section("why tests were skipped")
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count:4} x {reason.removeprefix('Skipped: ')}")
    if os.environ.get("CI") == "true":
        for reason in _absent(config):
            terminalreporter.line(f"FAILED: CI has to test this: {reason.removeprefix('Skipped: ')}", red=True)
