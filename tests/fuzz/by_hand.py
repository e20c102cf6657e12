"""Hostile files that no chance would make: each claims, or wants, what a reader must not believe."""

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator

import torch


def hostile() -> Iterator[tuple[str, str, bytes]]:
    """The kind of file, what it does, and its bytes."""
    for what, header in HEADERS.items():
        yield "safetensors", what, len(header).to_bytes(8, "little") + header + bytes(8)
    for what, made in (("a tensor of one number, shown 10**12 times", _expanded()), ("punycode", _codec("punycode"))):
        yield "torch zip", what, made
    yield "torch zip", "a list named in a list named in a list", _zip({"data.pkl": _folded(), "version": b"3"})
    yield "torch zip", "tables of a thousand tables", _zip({"data.pkl": _tables(), "version": b"3"})
    yield "torch zip", "a pickle of 10 million operations", _zip({"data.pkl": b"\x80\x02" + b"]0" * 5_000_000 + b"."})
    yield "torch zip", "packed a thousand to one", _zip({"data.pkl": bytes(200_000_000)}, zipfile.ZIP_DEFLATED)
    yield "torch pickle", "a pickle of 10 million operations", b"\x80\x02" + b"]0" * 5_000_000 + b"."
    bomb = "a: &a [x]\\n" + "\\n".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}' if i else '*a'] * 9)}]" for i in range(9))
    for what, text in {
        "names of names": bomb.replace("\\n", "\n"),
        "names of names in a number": f'out: x\nprompt: p\nsteps: "{bomb}"\n',
        "names of names in a text": f'out: "{bomb}"\nprompt: "{bomb}"\n',
        "an object": "out: !!python/object/apply:os.system [touch x]\nprompt: p\n",
        "merged tables": "a: &a {b: c}\nout: {!!merge x: [*a, *a]}\n",
        "sixty thousand values": f"out: x\nprompt: p\nseed: [{'1,' * 60_000}]\n",
        "a megabyte": f"out: x\nprompt: p\nseed: [{'[],' * 400_000}]\n",
        "depth": f"out: {'[' * 20_000}",
        "a long number": f"out: x\nprompt: p\nseed: {'9' * 5000}\n",
    }.items():
        yield "GenerateSettings", what, text.encode()
    for side in (12_000, 20_000, 100_000):
        yield "picture", f"PNG of {side}x{side}", _png(side, min(side, 12_000))
    yield "picture", "GIF of 65535x65535", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(40)
    for what, text in {
        "a playlist": "#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "a list of files": "ffconcat version 1.0\nfile /etc/passwd\n",
    }.items():
        yield "video", what, text.encode()
    box = struct.pack(">I4sI4sI", 20, b"ftyp", 0x69736F6D, b"isom", 0)
    for size in (2**32 - 1, 0, 7):
        yield "video", f"mp4 with a box of {size}", box + struct.pack(">I4s", size, b"moov") + bytes(64)
    yield "video", "mp4 with a long box", box + struct.pack(">I4sQ", 1, b"moov", 2**63 - 1) + bytes(64)
    yield "adapter_config.json", "a pattern that takes years", json.dumps({"alpha_pattern": {"(a+)+b": 1}}).encode()
    yield "settings.json", "depth", b"[" * 1_000_000


def _entry(**changed: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}


HEADERS = {
    "brackets": b'{"a":[' + b"[[[0]]]," * 1_300_000 + b"0]}",
    "depth": b'{"a":' * 100_000,
    "a name twice": b"{" + b",".join([b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'] * 2) + b"}",
    **{
        what: json.dumps(table).encode()
        for what, table in {
            "half a million axes": {"a": _entry(shape=[2**62] * 500_000)},
            "overlap": {"a": _entry(), "b": _entry()},
            "a gap": {"a": _entry(shape=[1], data_offsets=[4, 8])},
            "axes below zero": {"a": _entry(shape=[-1, -2])},
            "no end": {"a": _entry(shape=[0, 2**62], data_offsets=[2**62, 2**62])},
            "numbers that are none": {"a": _entry(shape=[True, 2.0])},
            "metadata that is a table": {"__metadata__": {"a": {"b": "c"}}, "a": _entry()},
        }.items()
    },
}


def _zip(entries: dict[str, bytes], packed: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packed) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def _expanded() -> bytes:
    stream = io.BytesIO()
    torch.save({"a.weight": torch.zeros(1).expand(10**6, 10**6)}, stream)
    return stream.getvalue()


def _codec(name: str) -> bytes:
    text = "".join(chr(0x4E00 + i % 20_000) for i in range(40_000)).encode()
    call = b"c_codecs\nencode\nX" + struct.pack("<I", len(text)) + text + b"X" + struct.pack("<I", len(name))
    return _zip({"data.pkl": b"\x80\x02}X\x01\x00\x00\x00a" + call + name.encode() + b"\x86Rs.", "version": b"3"})


def _folded() -> bytes:
    folded: list[object] = []
    for _ in range(30):
        folded = [folded] * 10
    return pickle.dumps({"a": folded}, protocol=2)


def _tables() -> bytes:
    table: dict[str, object] = {}
    for _ in range(3):
        table = {str(i): table for i in range(1000)}
    return pickle.dumps(table, protocol=2)


def _png(side: int, rows: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
