"""Spoilt and hostile files: each gives a result or the program's own error, soon, in little memory, importing nothing.

`python tests/fuzz_files.py --cases 20000` is the long form; here are a thousand of the same.
"""

from pathlib import Path

import pytest
from fuzz.by_hand import hostile
from fuzz.kinds import kinds
from fuzz.worker import Worker
from fuzz_files import Tally, count, fuzz

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def worker(every):
    worker = Worker({name: kind.ways for name, kind in every.items()})
    yield worker
    worker.stop()


def test_the_sound_files_are_read(every, worker):
    """Else what is refused below would be refused for a reason of its own."""
    refused = set()
    for name, kind in every.items():
        kind.path.parent.mkdir(parents=True, exist_ok=True)
        for seed in kind.seeds:
            kind.path.write_bytes(seed)
            outcome = worker.read(name, kind.path)
            assert not outcome.faults, name
            refused |= {(name, way) for way, end in outcome.ends.items() if end == "refused"}
        kind.path.write_bytes(kind.seeds[0])
    assert {name for name, _ in refused} <= {"settings.json", "video"}


def test_spoilt_files(every, worker):
    faults = {}
    parts = sum(kind.share for kind in every.values())
    for name, kind in every.items():
        its = fuzz(kind, name, worker, -(-900 * kind.share // parts))
        assert its.files > 5, name
        faults |= {name: list(its.faults)} if its.faults else {}
    assert not faults


def test_files_that_no_chance_would_make(every, worker):
    faults = {}
    for name, what, content in hostile():
        kind, its = every[name], Tally()
        count(its, kind, name, worker, content)
        faults |= {f"{name}: {what}": list(its.faults)} if its.faults else {}
    assert not faults
