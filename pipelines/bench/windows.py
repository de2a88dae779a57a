"""Timing windows: each stream runs in its own process; streams are measured in turn, so noise affects all equally."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from pipelines.bench.streams import Job, Stream
from pipelines.errors import DataError, one_line

# Opens a stream; raises DataError, ImportError or ValueError if it cannot run the job. Must be picklable.
Open = Callable[[Job], Stream]

_START_TIMEOUT_S = 240.0  # all start together, and stock FFCV compiles for 10 to 50 s on an idle machine


@dataclass(frozen=True)
class Window:
    """Result of one timing window."""

    img_per_s: float  # source images
    # Fraction of the pinned cores' time used by other programs, or by other guests of the same host. It does not affect
    # all streams equally: those with more threads lose less.
    busy_elsewhere_fraction: float


@dataclass
class Measured:
    """The windows of one stream, or the reason why there are none."""

    windows: list[Window] = field(default_factory=list)
    reason: str | None = None


def measure_in_turns(
    streams: Mapping[str, Open], job: Job, *, num_repetitions: int, window_s: float, say: Callable[[str], None]
) -> dict[str, Measured]:
    """Measure each stream `num_repetitions` times, in round-robin order.

    Args:
        streams: What to measure, by name.
        job: What they load.
        num_repetitions: Windows of each, >= 1.
        window_s: Length of a window in seconds, > 0.
        say: Called with progress messages.
    """
    names = list(streams)
    measured = {name: Measured() for name in names}
    with ExitStack() as stack:
        say(f"starting {', '.join(names)}")
        workers = {name: Worker(streams[name], job) for name in names}
        for worker in workers.values():
            stack.callback(worker.close)
        for worker in workers.values():
            worker.wait_until_ready()
        for repetition in range(num_repetitions):
            say(f"repetition {repetition + 1} of {num_repetitions}")
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                window = workers[name].measure(window_s)
                measured[name].windows += [window] if window else []
        for name, worker in workers.items():
            measured[name].reason = worker.reason
    return measured


class Worker:
    """A stream in its own process, which is stopped (SIGSTOP) whenever it is not starting or being measured.

    Otherwise the workers of a DataLoader would keep filling their queues for seconds, during the next stream's window.
    """

    def __init__(self, open_stream: Open, job: Job) -> None:
        self.reason: str | None = None  # why there is no result
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(open_stream, job, theirs))
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait until the stream has compiled and produced its first batches."""
        self._receive(_START_TIMEOUT_S)
        self._signal(signal.SIGSTOP)

    def measure(self, window_s: float) -> Window | None:
        """Measure one window; None if that failed, with the cause in `reason`."""
        if self.reason:
            return None
        self._signal(signal.SIGCONT)
        self._connection.send(window_s)
        window = self._receive(10 * window_s + 60)
        self._signal(signal.SIGSTOP)
        return window

    def close(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        self._signal(signal.SIGCONT)
        self._connection.close()  # which ends its loop
        self._process.join(10)
        self._process.kill()
        self._process.join()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children, if they still exist."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(number)

    def _receive(self, timeout_s: float) -> Window | None:
        try:
            answer = self._connection.recv() if self._connection.poll(timeout_s) else f"no answer in {timeout_s:.0f} s"
        except EOFError:
            answer = "its process ended"
        if isinstance(answer, Window):
            return answer
        self.reason = answer
        self._process.kill()  # so that it does not take cores from the other streams
        return None


def _serve(open_stream: Open, job: Job, connection: Connection) -> None:
    """Main loop of a stream's process: warm up, report it, then measure a window per request until the pipe ends."""
    end_with_parent()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.num_threads])
    try:
        stream = open_stream(job)
        connection.send(_measure(stream, job, 0.0))  # compiles, starts threads and workers
        while True:
            connection.send(_measure(stream, job, connection.recv()))
    except (EOFError, BrokenPipeError):  # the parent has finished or died
        pass
    except Exception as error:
        connection.send(_explain(error))
    os._exit(0)  # DataLoader's workers end with their parent; FFCV's threads might never end


def _explain(error: Exception) -> str:
    """Describe an error in one line; our own errors need no type name."""
    message = one_line(error)
    return message if isinstance(error, DataError) else f"{type(error).__name__}: {message}"


def end_with_parent(_: int = 0) -> None:
    """Have Linux kill this process when its parent dies; a stopped process would otherwise stay forever."""
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent.pid:  # the parent died before the call
        os._exit(1)


def _measure(stream: Stream, job: Job, window_s: float) -> Window:
    """Measure one window. Batches already waiting are discarded first; only whole rounds of the workers count."""
    num_rounds = -(-stream.num_ahead // job.num_threads) + 1
    for _ in range(num_rounds * job.num_threads):
        next(stream.batches)
    stream.synchronise()
    others_s = _cpu_s_of_others()
    num_batches, start_s, elapsed_s = 0, time.perf_counter(), 0.0
    while not num_batches or elapsed_s < window_s:
        for _ in range(job.num_threads):
            next(stream.batches)
        num_batches += job.num_threads
        elapsed_s = time.perf_counter() - start_s
    stream.synchronise()
    elapsed_s = time.perf_counter() - start_s
    busy = (_cpu_s_of_others() - others_s) / (elapsed_s * job.num_threads)
    return Window(num_batches * job.batch_size / elapsed_s, min(max(busy, 0.0), 1.0))


def _cpu_s_of_others() -> float:
    """CPU time that this process's cores spent on anything but this process and its children."""
    import psutil

    cores = psutil.cpu_times(percpu=True)
    used_s = sum(sum(cores[i]) - cores[i].idle - cores[i].iowait - cores[i].guest for i in os.sched_getaffinity(0))
    this = psutil.Process()
    own_s = sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))
    return used_s - own_s
