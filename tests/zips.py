"""Zips written by hand, so that every field of them can be wrong."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numcodecs.pcodec import PCodec


@dataclass
class Member:
    """One member; `local` and `central` are fields that its two headers state wrongly."""

    name: bytes
    data: bytes
    local: dict[str, int] = field(default_factory=dict)
    central: dict[str, int] = field(default_factory=dict)
    local_extra: bytes = b""
    central_extra: bytes = b""
    note: bytes = b""
    local_name: bytes | None = None
    before: bytes = b""  # between this member and the one before it


def make_zip(
    members: list[Member], *, before: bytes = b"", after: bytes = b"", end: dict[str, int] | None = None
) -> bytes:
    """A zip as the specification of the format draws it: members, directory, end; `before` and `after` in between."""
    body, directory = b"", b""
    for member in members:
        common = {"needed": 20, "flags": 0, "method": 0, "time": 0, "date": 33, "crc": zlib.crc32(member.data)}
        common |= {"packed": len(member.data), "length": len(member.data)}
        body += member.before
        at = {"made": 0x0314, "disk": 0, "internal": 0, "external": 0o600 << 16, "offset": len(body)}
        local, central = common | member.local, common | at | member.central
        name = member.name if member.local_name is None else member.local_name
        fields = ("needed", "flags", "method", "time", "date", "crc", "packed", "length")
        body += struct.pack("<4s5H3L", b"PK\3\4", *(local[key] for key in fields))
        body += struct.pack("<2H", len(name), len(member.local_extra)) + name + member.local_extra + member.data
        directory += struct.pack("<4sH5H3L", b"PK\1\2", central["made"], *(central[key] for key in fields))
        directory += struct.pack("<3H", len(member.name), len(member.central_extra), len(member.note))
        directory += struct.pack("<2H2L", *(central[key] for key in ("disk", "internal", "external", "offset")))
        directory += member.name + member.central_extra + member.note
    body += before
    stated = {"disk": 0, "start": 0, "here": len(members), "all": len(members)}
    stated |= {"size": len(directory), "at": len(body), "comment": 0} | (end or {})
    return body + directory + after + struct.pack("<4s4H2LH", b"PK\5\6", *stated.values())


def members_of(data: bytes) -> list[Member]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Member(info.filename.encode(), archive.read(info)) for info in archive.infolist()]


def edit_members(data: bytes, edit: Callable[[dict[str, bytes]], object]) -> bytes:
    """A plain zip of other members; `edit` changes them in place."""
    members = {member.name.decode(): member.data for member in members_of(data)}
    edit(members)
    return make_zip([Member(name.encode(), content) for name, content in sorted(members.items())])


def pco(values: np.ndarray) -> bytes:
    """The chunk of some values, none of them padding."""
    return bytes(PCodec(level=8).encode(values))
