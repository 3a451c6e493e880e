"""Look through a pickle before it is loaded: no instruction in it may ask for more memory than the file explains."""

from __future__ import annotations

import pickletools

# number of bytes behind an instruction, of its argument's length, or of lines that end it
_FIXED: dict[int, int] = {}
_COUNTED: dict[int, int] = {}
_LINES: dict[int, int] = {}
_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
for _opcode in pickletools.opcodes:
    _code, _size = ord(_opcode.code), 0 if _opcode.arg is None else _opcode.arg.n
    if _size >= 0:
        _FIXED[_code] = _size
    elif _size in _WIDTHS:
        _COUNTED[_code] = _WIDTHS[_size]
    else:
        _LINES[_code] = 2 if _opcode.name in ("GLOBAL", "INST") else 1
_LONG_BINPUT, _PUT, _STOP = b"rp."


def check_budget(content: bytes) -> None:
    """Raise ValueError for a pickle whose memo or values could be larger than the pickle itself.

    Python's unpickler makes room for a memo entry of any number, and for a byte array of any size, before it reads on.
    """
    place, end = 0, len(content)
    while place < end:
        code = content[place]
        place += 1
        if code == _STOP:
            return
        if code in _FIXED:
            if code == _LONG_BINPUT and int.from_bytes(content[place : place + 4], "little") > end:
                raise ValueError(f"an instruction at byte {place - 1} asks for an absurd entry of the memo")
            place += _FIXED[code]
        elif code in _COUNTED:
            width = _COUNTED[code]
            size = int.from_bytes(content[place : place + width], "little")
            place += width + size
            if place > end:
                raise ValueError(f"an instruction at byte {place - width - size - 1} asks for {size} bytes")
        elif code in _LINES:
            line_start = place
            for _ in range(_LINES[code]):
                place = content.index(b"\n", place) + 1
            if code == _PUT and int(content[line_start : place - 1]) > end:
                raise ValueError(f"an instruction at byte {line_start - 1} asks for an absurd entry of the memo")
        else:
            raise ValueError(f"byte {place - 1} is no instruction")
    raise ValueError("it has no end")
