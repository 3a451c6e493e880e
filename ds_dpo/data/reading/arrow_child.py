"""A program that reads Arrow streams, and says what is wrong with them, for arrow_check; it imports pyarrow alone.

Stdin: paths, each ended by a zero byte. Stdout: a line `at N` before file N is read, and a last line `error TEXT` or
`sound`. pyarrow may end this process instead: it trusts lengths in damaged metadata, and offsets in damaged columns.
"""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa


def main() -> None:
    paths = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").split("\0")[:-1]
    for number, path in enumerate(paths):
        print("at", number, flush=True)
        try:
            with pa.memory_map(path) as source, pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    for column in batch.columns:
                        check(column)
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            print("error", " ".join((str(error) or type(error).__name__).split()))
            return
    print("sound")


def check(array: pa.Array) -> None:
    """Raise ValueError for values outside of their buffers. Text that is not UTF-8 is sound: its row is a bad one."""
    type_ = array.type
    if isinstance(array, pa.ExtensionArray):
        check(array.storage)
    elif pa.types.is_string(type_) or pa.types.is_large_string(type_):
        as_bytes = pa.large_binary() if pa.types.is_large_string(type_) else pa.binary()
        pa.Array.from_buffers(as_bytes, len(array), array.buffers(), offset=array.offset).validate(full=True)
    elif pa.types.is_struct(type_):
        array.validate()
        for number in range(type_.num_fields):
            check(array.field(number))
    elif pa.types.is_list(type_) or pa.types.is_large_list(type_):
        array.validate()
        _check_offsets(array)
        check(array.values)
    elif pa.types.is_fixed_size_list(type_):
        array.validate()
        check(array.values)
    else:
        array.validate(full=True)


def _check_offsets(array: pa.Array) -> None:
    offsets = np.asarray(array.offsets)
    if len(offsets) and (offsets[0] < 0 or offsets[-1] > len(array.values) or (np.diff(offsets) < 0).any()):
        raise ValueError(f"offsets of {array.type} do not ascend within its values")


if __name__ == "__main__":
    main()
