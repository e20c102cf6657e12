"""All stages and the clips of one command in a process of its own, which is killed at random moments."""

import itertools
import json
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from sampling.generate import GenerateSettings, generate_files
from sampling.whole import read_whole
from train.run import RunSettings, run

PHASES = ("starting", "training", "saving", "generating")
CLIP = {"prompt": ["a teddy bear runs"], "steps": 2, "num_frames": 2, "height": 32, "width": 32}


def work(flags, material, home, phase, writes):
    """What is killed: with home as the current folder, `run/` with all stages and a clip, then `frames/`.

    `phase` says where it is, `writes` how many files it began to write.
    """
    import sampling.generate
    import train.stage
    import weights.files
    import weights.folders

    os.chdir(home)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which no kill gives back

    @contextmanager
    def within(name):
        before, phase.value = phase.value, PHASES.index(name)
        yield
        phase.value = before

    def noted(module, function, name):
        inner = getattr(module, function)

        def outer(*arguments, **options):
            with within(name):
                return inner(*arguments, **options)

        setattr(module, function, outer)

    workplace = weights.folders.workplace

    @contextmanager
    def counted(folder):
        writes.value += 1
        with within("saving"), workplace(folder) as place:
            yield place

    weights.files.workplace = weights.folders.workplace = counted
    noted(train.stage, "train", "training")
    noted(sampling.generate, "sample_videos", "generating")
    few = {"rank": 2, "save_every": 1}
    looks = {"images": str(material / "photos"), "prompt": "a teddy bear", "steps": 3, **few}
    moves = {"video": str(material / "clip.mp4"), "prompt": "a man runs", "steps": 4, **few}
    both = {"prompt": CLIP["prompt"][0], "steps": 3, "reference_steps": 1, "save_every": 1}
    size = {name: CLIP[name] for name in ("num_frames", "height", "width")}
    sections = {"appearance": looks, "motion": moves, "ttt": both, "generate": {"steps": CLIP["steps"], "seed": [1, 2]}}
    run(RunSettings(**flags, **size, **sections, out="run"))
    generate_files(GenerateSettings(**flags, **CLIP, lora=["run/ttt"], out="frames/"))


class Killer:
    """Starts `work` again and again in fresh folders below `root`, by a server that has imported all it takes."""

    def __init__(self, flags, material, root, seed):
        self.flags, self.material, self.root = flags, material, root
        self.random = random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["kills"])
        self.phase, self.writes = self.context.RawValue("i", 0), self.context.RawValue("i", 0)
        home, started = self.fresh("whole"), time.monotonic()
        assert not self.start(home)
        self.whole, self.total = contents(home), self.writes.value
        self.gap = (time.monotonic() - started) / self.total  # seconds from a write to the next

    def fresh(self, name):
        home = self.root / name
        home.mkdir()
        return home

    def start(self, home, after=None, phase=None):
        """Run `work` to its end, or kill it in some moment of a phase, so many writes or more after its beginning.

        Returns whether it was killed. Most kills come soon after the phase began: saving is over in milliseconds.
        """
        self.phase.value = self.writes.value = 0
        arguments = (self.flags, self.material, home, self.phase, self.writes)
        process = self.context.Process(target=work, args=arguments)
        process.start()
        if after is not None:
            while process.is_alive() and (self.writes.value < after or self.phase.value != phase):
                time.sleep(0.0005)
            time.sleep(self.gap * self.random.random() ** 3)
            process.kill()
        process.join()
        assert process.exitcode in (0, -9), (home / "output.txt").read_text()
        return process.exitcode != 0

    def kill(self, count):
        """So many kills, each followed by the same command in the same folder; counts of where they landed."""
        landed, home, names = Counter(), None, (f"killed-{number}" for number in itertools.count())
        while sum(landed.values()) < count:
            home = home or self.fresh(next(names))
            if self.start(home, self.random.randrange(self.total), self.random.randrange(len(PHASES))):
                landed[PHASES[self.phase.value]] += 1
                check_whole(home)
            else:
                home = self.check_end(home)
        if home is not None:
            assert not self.start(home)
            self.check_end(home)
        return dict(landed)

    def check_end(self, home):
        """The folder of a run that came to its end is that of the run which nothing disturbed, byte for byte."""
        found = contents(home)
        assert found.keys() == self.whole.keys()
        assert [name for name in found if found[name] != self.whole[name]] == []


def contents(home):
    """Every file by its name: its bytes, but for a log, whose seconds are never the same."""
    files = {str(file.relative_to(home)): file for file in home.rglob("*") if file.name != "output.txt"}
    kept = {name: file.read_bytes() for name, file in files.items() if file.is_file() and file.suffix != ".csv"}
    logs = {name: file.read_text().splitlines() for name, file in files.items() if file.suffix == ".csv"}
    return {**kept, **{name: [row.rpartition(",")[0] for row in rows] for name, rows in logs.items()}}


def check_whole(home):
    """Nothing that stands under its final name is half written."""
    for file in sorted(home.rglob("*.*")):
        if any(part.startswith(".writing-") for part in file.parts) or not file.is_file():
            continue
        if file.suffix == ".safetensors":
            assert load_file(file), file
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".pt":
            assert torch.load(file, weights_only=True)["checksum"], file
        elif file.suffix == ".mp4":
            assert len(read_whole(file)[0]) == CLIP["num_frames"], file
        elif file.suffix == ".png":
            assert len(read_whole(file.parent)[0]) == CLIP["num_frames"], file
        elif file.suffix == ".csv":
            head, *rows = file.read_text().splitlines()
            assert {row.count(",") for row in rows} <= {head.count(",")}, file
            assert file.read_bytes().endswith(b"\n"), file
        else:
            assert file.name == "output.txt", file
