"""How time is taken: everybody in one process, in turns, and only who is right.

What differs between CPU and CUDA lives here, in the clocks.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from .cases import Case
from .peers import OURS, TRUTH, Absent, Contender, Op, contenders, default_backends

Call = Callable[[], object]
Once = Callable[[], float]


class Clock(Protocol):
    """Turns work into a timer."""

    def prepare(self, make: Callable[[], Call]) -> Once:
        """Call make once to get the work, warm it up, and return what runs it once and tells the seconds."""
        ...


class WallClock:
    """Python's own clock around one call: all there is on a CPU."""

    def prepare(self, make: Callable[[], Call]) -> Once:
        call = make()
        for _ in range(2):
            call()

        def once() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return once


class GraphClock:
    """Events around the replay of a CUDA graph of several calls: what the device needs, whatever Python needs."""

    calls = 10

    def prepare(self, make: Callable[[], Call]) -> Once:
        # The backward runs on the stream of its forward, so the work is made on the stream that will be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call = make()
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(self.calls):
                call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        # The graph reads what the work holds, weights and saved tensors, which must live as long.
        def once(held: Call = call) -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / self.calls

        once()
        return once


class CallClock:
    """Several eager calls and one synchronisation: what a call costs its caller on a GPU, Python included."""

    def __init__(self, calls: int = 100) -> None:
        self.calls = calls

    def prepare(self, make: Callable[[], Call]) -> Once:
        call = make()
        for _ in range(self.calls):
            call()

        def once() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self.calls):
                call()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / self.calls

        return once


def clock_for(case: Case, device: str) -> Clock:
    if device == "cpu":
        return WallClock()
    torch.backends.cudnn.benchmark = True  # peers run the algorithm that suits them best
    return CallClock() if case.purpose == "call" else GraphClock()


class Sample(NamedTuple):
    """Many calls of one contender, in microseconds."""

    min_us: float
    median_us: float
    calls: int


class Turn(NamedTuple):
    """A timer, and the context it must run in."""

    once: Once
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def interleave(turns: Sequence[Turn], seconds: float, rounds: int = 10, at_least: int = 3) -> list[Sample]:
    """Time everybody in turns, so that whatever else the machine does meets all alike.

    Each gets ``seconds`` in all, spread evenly over the rounds, and at least ``at_least`` calls. A fast one thus makes
    many calls a turn, the first of which finds the caches as the previous contender left them.
    """
    times: list[list[float]] = [[] for _ in turns]
    with _no_garbage_collection():
        for turn in range(1, rounds + 1):
            for (once, context), taken in zip(turns, times, strict=True):
                with context():
                    spent = sum(taken)
                    while spent < seconds * turn / rounds or len(taken) < min(turn, at_least):
                        taken.append(once())
                        spent += taken[-1]
    return [Sample(min(taken) * 1e6, statistics.median(taken) * 1e6, len(taken)) for taken in times]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Inputs:
    """What a case is run on. A peer's output may be a pixel larger than ours: gradients are cut from a larger one."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.x = case.input(device)
        side = case.size // case.stride + 2
        generator = torch.Generator(device).manual_seed(1)
        self._dy = torch.randn((*case.shape[:2], side, side), generator=generator, device=device)

    def work(self, op: Op, x: torch.Tensor | None = None) -> Call:
        """What is timed. The backward is autograd's alone: its forward has run, and its graph is kept."""
        x = (self.x if x is None else x).detach()
        if self.case.direction == "forward":
            return lambda: op(x)
        x.requires_grad_()
        # What an op learns has gradients too, which a training step wants.
        wanted = (x, *op.parameters()) if isinstance(op, torch.nn.Module) else (x,)
        y = op(x)
        # The gradient comes in the format of the output, as the next layer's backward would send it.
        dy = torch.empty_like(y, requires_grad=False).copy_(self._dy[: len(y), :, : y.shape[-2], : y.shape[-1]])
        if self.case.direction == "backward":
            return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)
        return lambda: torch.autograd.grad(op(x), wanted, dy)

    def values(self, op: Op, x: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """What comes out: one tensor, or the gradients of x and of what the op learns."""
        result = self.work(op, x)()
        return result if isinstance(result, tuple) else (result,)


def difference(contender: Contender, op: Op, inputs: Inputs) -> float:
    """Largest difference from the same work done otherwise, in units of what rounding may cause: green is at most 1.

    This library answers to the plain form in float64 (on one image where images do not meet), the peers to this library.
    Every product may be rounded to float32, and each of 2k sums to the tensor's dtype, as in a peer of many steps; a sum over
    all pixels of a channel adds up their number's root of roundings to float32, where errors do not all point one way.
    """
    case = inputs.case
    if contender.role == "ours":
        some = case.batch if case.images_meet else 1
        exact: Op = TRUTH[case.op](replace(case, dtype="fp64"), inputs.device)
        truth = inputs.values(exact, inputs.x[:some].double())
        pairs = [(given[:some], expected[:some]) for given, expected in zip(inputs.values(op), truth)]
    else:
        ours = OURS[case.op](case, inputs.device, **contender.equal(case))
        pairs = list(zip(inputs.values(op), inputs.values(ours)))
    single = torch.finfo(torch.float32).eps
    rounding = case.k**2 * single + 2 * case.k * torch.finfo(inputs.x.dtype).eps
    if case.images_meet:
        rounding += math.sqrt(inputs.x.numel() / case.channels) * single
    return max(
        float(
            (given.double() - expected.double()).abs().max().detach()
            / (rounding * expected.abs().max().detach().double())
        )
        if given.shape == expected.shape
        else math.inf
        for given, expected in pairs
    )


def training(module: torch.nn.Module, x: torch.Tensor) -> Call:
    """One forward and backward, with the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    wanted = (x, *module.parameters())
    with torch.no_grad():
        dy = torch.randn_like(module(x))

    def step() -> object:
        return torch.autograd.grad(module(x), wanted, dy)

    return step


def kept_bytes(forward: Call, held: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps between forward and backward: every storage once, none of what is held anyway."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    others = storages.keys() - {tensor.untyped_storage().data_ptr() for tensor in held}
    return sum(storages[pointer].nbytes() for pointer in others)


def peak_bytes(call: Call, device: str) -> int:
    """Largest amount of tensor memory held at once during a call, above what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU allocator keeps no peak; the profiler records each of its allocations and releases.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _backward_repeatable() -> contextlib.AbstractContextManager[None]:
    """A backward timed many times on one graph must not be compiled to overwrite what that graph has saved."""
    return torch._functorch.config.patch(donated_buffer=False)


@dataclass(frozen=True)
class Result:
    """One contender at one case. Whoever was not timed has a status that says why."""

    contender: Contender
    status: str = "ok"
    sample: Sample | None = None
    share: float | None = None
    kept_bytes: int | None = None


COPY = Contender("copy", "yardstick", lambda case, device: torch.clone)


def measure(case: Case, contenders: Sequence[Contender], device: str, seconds: float) -> list[Result]:
    """Check everybody, then time who is right in turns, with a copy of the input into a warm tensor among them.

    The share of copy speed is (fewest bytes the op must move / its time) over (2 bytes of x / time of the copy).
    """
    # The compiled functions of earlier cases would add their guards to the calls of this one.
    torch.compiler.reset()
    clock, inputs = clock_for(case, device), Inputs(case, device)
    with _backward_repeatable():
        entries = [_enter(contender, inputs, clock) for contender in contenders]
    target = torch.empty_like(inputs.x)
    turns = [Turn(clock.prepare(lambda: lambda: target.copy_(inputs.x)))]
    turns += [Turn(once, result.contender.context) for result, once in entries if once]
    copy, *samples = interleave(turns, seconds)
    taken = iter(samples)
    results = [Result(COPY, sample=copy, share=1.0)]
    for result, once in entries:
        if once:
            sample = next(taken)
            share = case.fewest_bytes / (2 * case.input_bytes) * copy.min_us / sample.min_us
            # A whole step moves the bytes of both directions, and a vendor's kernel of other work has its own count.
            known = case.direction != "forward+backward" and result.contender.role != "yardstick"
            result = replace(result, sample=sample, share=share if known else None)
        results.append(result)
    return results


def warm(case: Case, wanted: Sequence[tuple[str, str]], device: str, threads: int) -> None:
    """Compile contenders, by name and backend, for the caches on disk: the code depends on the number of threads."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    inputs = Inputs(case, device)
    with _backward_repeatable():
        for contender in contenders(case, device, default_backends(device), bars=True):
            if (contender.name, contender.backend) in wanted:
                with contender.context():
                    inputs.values(contender.build(case, device))


def _enter(contender: Contender, inputs: Inputs, clock: Clock) -> tuple[Result, Once | None]:
    try:
        with contender.context():
            op = contender.build(inputs.case, inputs.device)
            if contender.role != "yardstick" and (off := difference(contender, op, inputs)) > 1:
                return Result(contender, f"differs: {off:.3g} times what rounding explains"), None
            x = inputs.x.detach().requires_grad_()
            kept = kept_bytes(lambda: op(x)) if inputs.case.direction == "backward" else None
            return Result(contender, kept_bytes=kept), clock.prepare(lambda: inputs.work(op))
    except Absent as absent:
        return Result(contender, f"absent: {absent}"), None
    except Exception as error:  # a peer that cannot do this case is a finding, not the end of the run
        lines = str(error).strip().splitlines() or [""]
        return Result(contender, f"failed: {type(error).__name__}: {lines[0]}"), None
