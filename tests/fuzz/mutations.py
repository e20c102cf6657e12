"""Ways to spoil a file: blind ones for any bytes, and others that know what a header or a pickle looks like."""

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[Any], Any]

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (
    *NUMBERS,
    *(-1, 1.5, 1e308, float("nan"), 10**30, None, True, "", "x" * 300, "../../etc/passwd", "\u202e\0\n\x1b[2J"),
    *([], {}, [-1], [2**40, 2**40], [[[[]]]], {"a": {"b": {}}}, "F32", "F4", "I64"),
)
GLOBALS = (
    *("posix system", "os system", "builtins eval", "builtins exec", "builtins getattr", "builtins __import__"),
    *("subprocess Popen", "fuzz_canary touch", "pytorch_lightning.fuzz_canary touch", "numpy.core.multiarray scalar"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage", "torch hub.load"),
    *("collections OrderedDict", "torch.nn.modules.container ParameterDict", "torch._tensor _rebuild_from_type_v2"),
    *("torch Tensor", "torch.storage _load_from_bytes", "torch._utils _rebuild_sparse_tensor", "_codecs encode"),
)
CALL = b"c%s\n(X\x05\x00\x00\x00touchtR0"  # call a name with one text, and drop what it gives


def mutated(draw: Draw, seeds: Sequence[bytes], structured: Callable[[Draw, bytes], bytes] | None) -> bytes:
    """One of the seeds, spoilt in one to four ways."""
    data = draw(st.sampled_from(seeds))
    aware = structured is not None and draw(st.booleans())
    if aware:
        assert structured is not None
        data = structured(draw, data)
    for _ in range(draw(st.integers(0 if aware else 1, 4))):
        data = draw(st.sampled_from(BLIND))(draw, data, seeds)
    return data


def place(draw: Draw, data: bytes) -> int:
    """Anywhere in the data, with a leaning to its first and last bytes, where headers and directories are."""
    last = max(len(data) - 1, 0)
    low, high = draw(st.sampled_from([(0, last), (0, min(last, 600)), (max(0, last - 600), last)]))
    return int(draw(st.integers(low, high)))


def flip(draw: Draw, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = place(draw, data)
    return data[:at] + bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[at : at + 1]) + data[at + 1 :]


def overwrite(draw: Draw, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at, size = place(draw, data), draw(st.sampled_from([1, 2, 4, 8]))
    number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * size)
    return data[:at] + number.to_bytes(size, draw(st.sampled_from(["little", "big"]))) + data[at + size :]


def cut(draw: Draw, data: bytes, seeds: Sequence[bytes]) -> bytes:
    return data[: place(draw, data)]


def remove(draw: Draw, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = place(draw, data)
    return data[:at] + data[at + draw(st.integers(1, 64)) :]


def insert(draw: Draw, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = place(draw, data)
    return data[:at] + draw(st.binary(min_size=1, max_size=16)) + data[at:]


def repeat(draw: Draw, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = place(draw, data)
    piece = data[at : at + draw(st.integers(1, 256))]
    return data[:at] + piece * draw(st.integers(2, 20)) + data[at:]


def splice(draw: Draw, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = draw(st.sampled_from(seeds))
    return data[: place(draw, data)] + other[place(draw, other) :]


BLIND = (flip, overwrite, cut, remove, insert, repeat, splice)


def spoil_safetensors(draw: Draw, data: bytes) -> bytes:
    """Another header over the same tensors, its own length stated rightly."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = draw(st.sampled_from(sorted(header)))
    match draw(st.integers(0, 6)):
        case 0:
            header[key] = draw(st.sampled_from(VALUES))
        case 1 if isinstance(header[key], dict):
            header[key][draw(st.sampled_from(["dtype", "shape", "data_offsets", "new"]))] = draw(
                st.sampled_from(VALUES)
            )
        case 2 if "data_offsets" in header[key]:
            header[key]["data_offsets"] = [draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(NUMBERS))]
        case 3 if "shape" in header[key]:
            shape = header[key]["shape"]
            header[key]["shape"] = draw(
                st.sampled_from([shape[::-1], [*shape, 1], shape[1:], [0, *shape], [2**62] * 4])
            )
        case 4:
            header["__metadata__"] = draw(st.sampled_from(VALUES))
        case 5:
            header[draw(st.sampled_from([*VALUES_AS_KEYS, *sorted(header)])) + "x"] = header[key]
        case _:
            del header[key]
    text = json.dumps(header)
    if draw(st.integers(0, 9)) == 0:
        text = text[:-1] + f", {json.dumps(key)}: {text[:-1]}" + "}}"  # the name a second time
    if draw(st.integers(0, 19)) == 0:
        text = text[:-1] + ', "deep": ' + "[" * 5000 + "]" * 5000 + "}"
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data[8 + length :]


VALUES_AS_KEYS = ("", "module.", "../x", "\u202e", "lora_unet_", "a" * 1000)


def spoil_json(draw: Draw, data: bytes) -> bytes:
    """Another value somewhere in a JSON or YAML table; other text is left as it is."""
    try:
        table = json.loads(data)
    except ValueError:
        lines = data.split(b"\n")
        at = draw(st.integers(0, len(lines) - 1))
        value = json.dumps(draw(st.sampled_from(VALUES))).encode()
        return b"\n".join([*lines[:at], lines[at].split(b":")[0] + b": " + value, *lines[at + 1 :]])
    here = table
    for _ in range(draw(st.integers(0, 2))):
        inner = [value for value in (here.values() if isinstance(here, dict) else here) if value and _holds(value)]
        here = draw(st.sampled_from(inner)) if inner else here
    if not _holds(here) or not here:
        return data
    key = draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))
    here[key] = draw(st.sampled_from(VALUES))
    return json.dumps(table).encode()


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def spoil_torch(draw: Draw, data: bytes) -> bytes:
    """Another pickle inside a torch zip, the zip itself written anew or its directory spoilt; or in a bare pickle."""
    if not data.startswith(b"PK"):
        return spoil_pickle(draw, data)
    made = io.BytesIO()
    packed = draw(st.sampled_from([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w", packed) as other:
        names = archive.namelist()
        lost = draw(st.sampled_from([*names, *[""] * 20]))
        for name in names:
            content = archive.read(name)
            if name.endswith("data.pkl"):
                content = spoil_pickle(draw, content)
            elif "/data/" in name and draw(st.integers(0, 9)) == 0:
                content = content[: draw(st.integers(0, len(content)))]
            if name != lost:
                other.writestr(name, content)
    data = made.getvalue()
    if draw(st.integers(0, 3)) == 0:  # sizes and places in the directory
        at = data.rfind(b"PK\x01\x02") + draw(st.sampled_from([8, 10, 20, 24, 28, 30, 32, 42]))
        data = data[:at] + struct.pack("<I", draw(st.sampled_from(NUMBERS)) % 2**32) + data[at + 4 :]
    return data


def spoil_pickle(draw: Draw, data: bytes) -> bytes:
    """One to three operations replaced, dropped, doubled or put in, of any of the pickles that the data begins with."""
    for _ in range(draw(st.integers(1, 3))):
        found = operations(data)
        if not found:
            return data
        globals_, numbers = ([each for each in found if each[0] in names] for names in (("GLOBAL",), INTEGERS))
        name, start, end = draw(st.sampled_from(draw(st.sampled_from([found, globals_ or found, numbers or found]))))
        piece = data[start:end]
        hostile = draw(st.sampled_from(GLOBALS)).replace(" ", "\n").encode()
        match draw(st.integers(0, 4)):
            case 0:
                piece = b""
            case 1:
                piece = piece * 2
            case 2:
                piece = CALL % hostile + piece
            case 3 if name in INTEGERS:
                piece = b"\x8a\x09" + draw(st.sampled_from([*NUMBERS, -1, -(2**31)])).to_bytes(9, "little", signed=True)
            case _:
                piece = (
                    b"c" + hostile + b"\n"
                    if name == "GLOBAL"
                    else draw(st.sampled_from(list(b".0R(tNb}]Q"))).to_bytes()
                )
        data = data[:start] + piece + data[end:]
    return data


INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")


def operations(data: bytes) -> list[tuple[str, int, int]]:
    """Name, first and last byte of each operation of the pickles at the head of the data; no more than 3000 of them."""
    found: list[tuple[str, int, int]] = []
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data) and len(found) < 3000:
            here = [(operation.name, at) for operation, _, at in pickletools.genops(stream) if at is not None]
            ends = [at for _, at in here[1:]] + [stream.tell()]
            found += [(name, at, end) for (name, at), end in zip(here, ends, strict=True)]
    except Exception:
        pass  # tensors' bytes follow, or an earlier change broke it
    return found
