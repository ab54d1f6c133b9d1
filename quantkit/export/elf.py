"""What a compiled GPU kernel says of itself: parameters and shared memory, read from its ELF file.

NVIDIA (cubin): section `.nv.info.<kernel>` is a list of attributes; those of type KPARAM_INFO give ordinal,
offset and size of each parameter; `.nv.shared.<kernel>` is the static shared memory, of which the system
keeps 1 KB from sm_90 on. AMD (hsaco): the 64-byte kernel descriptor `<kernel>.kd` holds the size of the
argument block at offset 8 and of static LDS at offset 0 (LLVM's AMDGPU usage guide).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from quantkit.errors import QuantkitError

_KPARAM_INFO = 0x17
_SVAL = 4
#: Bytes by type of Triton's signature; pointers (`*fp16`) are 8 bytes wide.
SIZES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "u32": 4, "fp32": 4, "i64": 8, "u64": 8}


@dataclass(frozen=True)
class Section:
    """A section's bytes and header fields."""

    name: str
    kind: int
    size: int
    data: bytes
    link: int


def sections(binary: bytes) -> list[Section]:
    """All sections of a 64-bit little-endian ELF file; QuantkitError for anything else."""
    try:
        if binary[:6] != b"\x7fELF\x02\x01":
            raise ValueError("no 64-bit little-endian ELF file")
        (start,) = struct.unpack_from("<Q", binary, 40)
        size, count, names = struct.unpack_from("<HHH", binary, 58)
        heads = [struct.unpack_from("<IIQQQQIIQQ", binary, start + i * size) for i in range(count)]
        table = binary[heads[names][4] : heads[names][4] + heads[names][5]]
        out = []
        for name, kind, _, _, offset, length, link, *_ in heads:
            text = table[name : table.index(b"\0", name)].decode()
            data = b"" if kind == 8 else binary[offset : offset + length]  # 8: no bits in the file
            out.append(Section(text, kind, length, data, link))
        return out
    except (struct.error, ValueError, IndexError) as error:
        raise QuantkitError(f"the kernel's binary is damaged ({error})") from error


def parameters(binary: bytes, symbol: str) -> list[tuple[int, int]]:
    """(offset, size) of every parameter of an NVIDIA kernel, in order, hidden ones included."""
    wanted = f".nv.info.{symbol}"
    info = next((s.data for s in sections(binary) if s.name == wanted), None)
    if info is None:
        raise QuantkitError(f"the binary has no kernel {symbol}")
    found, at = {}, 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SVAL:
            if attribute == _KPARAM_INFO:
                _, ordinal, offset, packed = struct.unpack_from("<IHHI", info, at)
                found[ordinal] = (offset, packed >> 18)
            at += size
    return [found[i] for i in range(len(found))]


def static_shared(binary: bytes, symbol: str) -> int:
    """Bytes of shared memory that an NVIDIA kernel declares itself, the system's share included."""
    return sum(s.size for s in sections(binary) if s.name == f".nv.shared.{symbol}")


def argument_bytes(binary: bytes, symbol: str) -> int:
    """Bytes of an AMD kernel's argument block."""
    parts = sections(binary)
    table = next(s for s in parts if s.name == ".symtab" or s.kind == 2)
    names = parts[table.link].data
    for at in range(0, len(table.data), 24):
        name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", table.data, at)
        if names[name : names.index(b"\0", name)].decode() == f"{symbol}.kd":
            header = (
                struct.unpack_from("<Q", binary, 40)[0] + section * struct.unpack_from("<H", binary, 58)[0]
            )
            _, _, _, address, offset, *_ = struct.unpack_from("<IIQQQQIIQQ", binary, header)
            return int(struct.unpack_from("<I", binary, offset + value - address + 8)[0])
    raise QuantkitError(f"the binary has no kernel {symbol}")


def layout(types: list[str]) -> list[tuple[int, int]]:
    """(offset, size) of parameters of these types, each aligned to its size."""
    out, at = [], 0
    for kind in types:
        size = 8 if kind.startswith("*") else SIZES[kind]
        at = -(-at // size) * size
        out.append((at, size))
        at += size
    return out


def check_signature(binary: bytes, symbol: str, types: list[str], *, cuda: bool) -> None:
    """QuantkitError unless the binary takes exactly parameters of these types."""
    want = layout(types)
    if cuda:
        got = parameters(binary, symbol)
        if got != want:
            raise QuantkitError(f"{symbol} takes parameters {got}, not {want}", hint="Report this.")
        return
    end = -(-(want[-1][0] + want[-1][1]) // 8) * 8
    size = argument_bytes(binary, symbol)
    if size != end:
        raise QuantkitError(f"{symbol} takes {size} bytes of arguments, not {end}", hint="Report this.")
