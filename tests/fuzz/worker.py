"""A process of its own to read hostile files in: what it does is watched, and it may hang, swell or die."""

import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.errors import UserError

SECONDS = 5.0  # of the processor's time, so that a busy machine is no hang
ON_THE_CLOCK = 120.0  # for what sleeps
MEMORY = 2**30  # above the idle program
# What reading a file has no business with. `pickle.find_class` comes from Python's own unpickler, which must not be
# used at all: torch's takes the names in its allow-list from a table and imports nothing.
WATCHED = ("pickle.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "ctypes.dlopen")


@dataclass
class Outcome:
    """What came of one file.

    Args:
        ends: how each way of reading it ended: "result", "refused", or the traceback of any other exception.
        seconds: of the processor.
        memory: bytes at the peak, above the idle program.
        seen: audit events that reading a file has no business with.
        died: the worker's exit code, where it did not come back.
    """

    ends: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    memory: int = 0
    seen: list[str] = field(default_factory=list)
    died: int | None = None

    @property
    def faults(self) -> list[str]:
        """All that must not be, in words."""
        found = sorted({end for end in self.ends.values() if end not in ("result", "refused")})
        found += [f"did {event}" for event in self.seen]
        if self.died is not None:
            found.append("hung" if self.died in (-signal.SIGPROF, -signal.SIGKILL) else f"died with {self.died}")
        if self.memory > MEMORY:
            found.append(f"took {self.memory / 2**20:.0f} MB")
        return found


Ways = Mapping[str, Callable[[Path], Any]]


class Worker:
    """Reads files in a forked process, which is forked anew after each death.

    Args:
        ways: by kind of file, the functions that read it, each with a name.
    """

    def __init__(self, ways: Mapping[str, Ways]) -> None:
        self.ways = ways
        self.process: Any = None

    def read(self, kind: str, path: Path) -> Outcome:
        """Read a file in all ways for its kind."""
        if self.process is None:
            self._start()
        self.pipe.send((kind, path))
        outcome = Outcome()
        try:
            if self.pipe.poll(ON_THE_CLOCK):
                return self.pipe.recv()
            os.kill(self.process.pid, signal.SIGKILL)
        except EOFError:
            pass
        self.process.join()
        outcome.died, self.process = self.process.exitcode, None
        return outcome

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.pipe.send(None)
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, its = context.Pipe()
        self.process = context.Process(target=_serve, args=(its, self.pipe, self.ways), daemon=True)
        self.process.start()
        its.close()


def _serve(pipe: Any, other: Any, ways: Mapping[str, Ways]) -> None:
    other.close()
    events: list[str] = []
    reading = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not reading:
            return
        if event.startswith(WATCHED) or (event == "import" and not _expected(arguments[0])):
            events.append(f"{event} {arguments[:2]!r}"[:200])

    sys.addaudithook(hook)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    os.dup2(sys.stdout.fileno(), 2)
    limit = _status("VmSize") + 3 * MEMORY  # the machine's safety; what counts is measured
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # its death, in whatever library it hangs
    idle = _status("VmRSS")
    while (task := pipe.recv()) is not None:
        kind, path = task
        outcome = Outcome()
        events.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        for name, way in ways[kind].items():
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            start, reading = time.process_time(), True
            try:
                way(path)
                outcome.ends[name] = "result"
            except UserError:
                outcome.ends[name] = "refused"
            except Exception as error:
                outcome.ends[name] = _told(error)
            reading = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            outcome.seconds = max(outcome.seconds, time.process_time() - start)
        outcome.memory, outcome.seen = max(0, _status("VmHWM") - idle), list(events)
        pipe.send(outcome)


def _told(error: Exception) -> str:
    """The exception, and the last line of the program that it came through."""
    tests = str(Path(__file__).parents[1])
    lines = [line for line in traceback.extract_tb(error.__traceback__) if not line.filename.startswith(tests)]
    ours = [line for line in lines if "site-packages" not in line.filename and "/lib/python" not in line.filename]
    last = ours[-1] if ours else lines[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}, {last.line}: {str(error)[:160]!r}"


# Modules that our own libraries load late, when something is first needed; a file can name none of these into memory
# that is not one of theirs.
LATE = ("encodings.", "torch.", "numpy.", "av.", "transformers.", "tokenizers.", "jsonargparse.", "stringprep", "_")


def _expected(module: str) -> bool:
    return module.startswith(LATE)


def _status(entry: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024
