"""The console command: one subcommand for each entry script, no logic of its own."""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from model.errors import UserError
from weights.command import run_command

COMMANDS = {
    "demo": ("eval.demo", "a first look: inputs, all stages, and a page that shows what came of it"),
    "run": ("train.run", "all four steps from one file"),
    "appearance": ("train.appearance", "stage 1: train a LoRA of a subject's looks on a few pictures"),
    "absorber": ("train.absorber", "learn a clip's looks, so that its motion LoRA need not"),
    "motion": ("train.motion", "stage 2: train a LoRA of the motion in one video"),
    "ttt": ("train.ttt", "stage 3: test-time training of both together"),
    "joint": ("train.joint", "a baseline, MotionDirector's: train both LoRAs in the same steps"),
    "generate": ("sampling.generate", "generate clips, with any number of LoRAs"),
    "edit": ("sampling.edit", "make a video anew with other words, frame by frame"),
    "score": ("eval.score", "score clips: prompt, subject, consistency, motion"),
    "export": ("weights.export", "write a LoRA as a file of other tools"),
    "merge": ("weights.merge", "write a base with LoRAs inside, for tools that know no LoRA"),
    "inspect": ("weights.inspect", "say what a file is"),
    "download": ("weights.download", "fetch Stable Diffusion 1.5, AnimateDiff's motion modules and more from the hub"),
}
USAGE = "usage: customttt COMMAND [--FLAG VALUE ...]\n\n" + "\n".join(
    f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items()
)


def command(argv: Sequence[str] | None = None) -> int | None:
    """Hand the words behind the command's name to its entry script."""
    name, *rest = (list(sys.argv[1:]) if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE + "\n\n`customttt COMMAND --help` lists its flags; `customttt --version` says which this is.")
        return 0
    if name == "--version":
        print(version("customttt"))
        return 0
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}\n{USAGE}")
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def main() -> None:
    """`customttt`."""
    run_command(command)


if __name__ == "__main__":
    main()
