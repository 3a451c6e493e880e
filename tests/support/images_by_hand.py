"""Image files written byte by byte, of kinds that Pillow reads but does not write."""

import struct
import zlib


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width, height, lines, *, depth=8, colour_type=2, before=(), after=()):
    """A PNG written by hand. lines: all bytes of its pixels. before, after: chunks around the pixels."""
    size = len(lines) // max(height, 1)
    filtered = b"".join(b"\0" + lines[start : start + size] for start in range(0, len(lines), size or 1))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(filtered))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *before, pixels, *after, png_chunk(b"IEND", b"")])


def jpeg_of(*levels, adobe_transform):
    """A baseline JPEG of one block of 8 x 8, written by hand: each component has the same stored level everywhere."""

    def segment(marker, content):
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    bits = ""
    for level in levels:
        mean = 8 * (level - 128)  # the DCT's first coefficient
        category = abs(mean).bit_length()
        value = mean if mean > 0 else mean + 2**category - 1
        bits += f"{category:04b}" + (f"{value:0{category}b}" if category else "") + "0"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    numbers = range(1, len(levels) + 1)
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, adobe_transform)),
            segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC0, struct.pack(">BHHB", 8, 8, 8, len(levels)) + b"".join(bytes([n, 0x11, 0]) for n in numbers)),
            segment(0xC4, b"\x00" + bytes([0, 0, 0, 12, *[0] * 12]) + bytes(range(12))),  # codes of 4 bits
            segment(0xC4, b"\x10" + bytes([1, *[0] * 15]) + b"\0"),  # the end of a block is "0"
            segment(0xDA, bytes([len(levels)]) + b"".join(bytes([n, 0]) for n in numbers) + b"\0\x3f\0"),
            scan,
            b"\xff\xd9",
        ]
    )
