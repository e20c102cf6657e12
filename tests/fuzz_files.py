"""Spoilt files for the whole program: how each of its readers takes them.

    python tests/fuzz_files.py --cases 20000

Prints a table of counts, and every fault; ends with 1 if there was one.
"""

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # in this order: tests/sampling must not stand in for sampling/

from fuzz.kinds import Kind, kinds  # noqa: E402
from fuzz.mutations import mutated  # noqa: E402
from fuzz.worker import Worker  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@dataclass
class Tally:
    """What came of the files of one kind.

    Args:
        files: how many.
        ends: of all their readings.
        slowest: seconds of the processor.
        largest: bytes above the idle program.
        faults: each kind of fault, and the first file that showed it.
    """

    files: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0
    faults: dict[str, bytes] = field(default_factory=dict)


def fuzz(kind: Kind, name: str, worker: Worker, cases: int, derandomize: bool = True) -> Tally:
    """Spoil the seeds of one kind `cases` times, and read what comes of it."""
    tally = Tally()

    @settings(
        max_examples=cases,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        count(tally, kind, name, worker, mutated(data.draw, kind.seeds, kind.spoil))

    sound = kind.path.read_bytes() if kind.path.exists() else None
    one()
    kind.path.unlink(missing_ok=True)
    if sound is not None:
        kind.path.write_bytes(sound)
    return tally


def count(tally: Tally, kind: Kind, name: str, worker: Worker, content: bytes) -> None:
    """Read one file, and add what came of it."""
    kind.path.parent.mkdir(parents=True, exist_ok=True)
    kind.path.write_bytes(content)
    outcome = worker.read(name, kind.path)
    tally.files += 1
    tally.ends.update(end if end in ("result", "refused") else "fault" for end in outcome.ends.values())
    tally.slowest, tally.largest = max(tally.slowest, outcome.seconds), max(tally.largest, outcome.memory)
    for fault in outcome.faults:
        tally.faults.setdefault(fault, content)


def table(tallies: dict[str, Tally]) -> str:
    """A row for each kind, and their sum."""
    head = f"{'kind':<28}{'files':>7}{'results':>9}{'refused':>9}{'faults':>8}{'slowest':>10}{'peak':>9}"
    rows = [
        f"{name:<28}{its.files:>7}{its.ends['result']:>9}{its.ends['refused']:>9}{len(its.faults):>8}"
        f"{its.slowest:>8.2f} s{its.largest / 2**20:>6.0f} MB"
        for name, its in tallies.items()
    ]
    every = tallies.values()
    results, refused = (sum(its.ends[end] for its in every) for end in ("result", "refused"))
    rows.append(
        f"{'all':<28}{sum(its.files for its in every):>7}{results:>9}{refused:>9}"
        f"{sum(len(its.faults) for its in every):>8}{max(its.slowest for its in every):>8.2f} s"
        f"{max(its.largest for its in every) / 2**20:>6.0f} MB"
    )
    return "\n".join([head, *rows])


def main() -> int:
    """Spoil, read, count."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--only", nargs="+", help="kinds; all if not given")
    parser.add_argument("--keep", type=Path, help="folder for the files that showed a fault")
    args = parser.parse_args()
    tallies = {}
    with tempfile.TemporaryDirectory() as folder:
        every = kinds(Path(folder))
        chosen = {name: kind for name, kind in every.items() if not args.only or name in args.only}
        parts = sum(kind.share for kind in chosen.values())
        worker = Worker({name: kind.ways for name, kind in every.items()})
        for name, kind in chosen.items():
            its = tallies[name] = fuzz(kind, name, worker, -(-args.cases * kind.share // parts))
            print(f"{name}: {its.files} files, {len(its.faults)} faults, {its.slowest:.2f} s", file=sys.stderr)
            for number, (fault, content) in enumerate(its.faults.items()):
                print(f"--- {name} {number}: {fault}\n", file=sys.stderr)
                if args.keep:
                    args.keep.mkdir(parents=True, exist_ok=True)
                    (args.keep / f"{name.replace('/', '-')}-{number}").write_bytes(content)
        worker.stop()
    print(table(tallies))
    return int(any(its.faults for its in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
