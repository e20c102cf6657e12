"""How commands end: one line for people on stderr, and an exit code."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from model.errors import UserError
from weights.files import printable


def run_command(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run an entry script's `main(argv)` and leave the process with its exit code.

    0 or what `main` returned; 2 after a UserError or when memory ran out (one line on stderr, no traceback); 130 after
    Ctrl-C. Warnings appear as one plain line each. Any other exception is a mistake of the program: it is shown whole.
    """
    warnings.showwarning = _show_warning
    try:
        code = main(argv) or 0
        sys.stdout.flush()
    except UserError as error:
        code = _complain(f"error: {error}", 2)
    except KeyboardInterrupt as stop:
        code = _complain(f"interrupted{': ' if str(stop) else ''}{stop}", 130)
    except (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        code = _complain(f"error: {error.filename} cannot be opened: {error.strerror}.", 2)
    except BrokenPipeError:
        # the reader (`| head`) has left: nothing to say, and Python must not try to flush at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        code = _complain(
            f"error: out of memory ({str(error).splitlines()[0] if str(error) else 'on the CPU'}). These flags lower "
            "what is needed: fewer --num_frames, smaller --width and --height, --gradient_checkpointing, --dtype "
            "float16 or bfloat16, a lower --rank.",
            2,
        )
    sys.exit(code)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        "out of memory" in text or "can't allocate memory" in text
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    tqdm.write(
        f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr
    )  # above a progress bar, not into it


def _complain(message: str, code: int) -> int:
    print("\n".join(map(printable, message.split("\n"))), file=sys.stderr)
    return code
