"""A checksum of weights, computed on their own device, to show that training did not change a reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_WORD_BYTES = 8
_ROW = 2**10  # words
_PIECE = _ROW * 2**12


def weights_checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return 64 hex digits over names, dtypes, shapes and contents of tensors, the same for any device and order.

    The contents enter by a 64-bit sum that changes with any single element, and so with any single bit. It protects
    against accidents, not against forgery. It reads memory once and copies nothing to the host; SHA-256 of 5 GB would
    take 10 s of a core, after a copy of the GPU's weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {content_sum(tensor.detach())}\n".encode())
    return digest.hexdigest()


def content_sum(tensor: Tensor) -> int:
    """Return the sum over a tensor's 64-bit words of (word) x (an odd number that depends on its place), modulo 2^64.

    Because the factor is odd, a change of one word always changes the sum.
    """
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, piece in enumerate(content.split(_PIECE * _WORD_BYTES)):
        words = _words(piece)
        whole = words.numel() // _ROW * _ROW
        for start, rows in ((0, words[:whole].view(-1, _ROW)), (whole, words[whole:].view(1, -1))):
            total += _weighted_sum(rows, first=number * _PIECE + start)
    return int(total)


def _words(content: Tensor) -> Tensor:
    """Return bytes as int64, padded with zeros to a multiple of 8; copied only if necessary."""
    missing = -content.numel() % _WORD_BYTES
    if missing:
        content = torch.cat([content, content.new_zeros(missing)])
    if content.storage_offset() % _WORD_BYTES:
        content = content.clone()
    return content.view(torch.int64)


def _weighted_sum(rows: Tensor, *, first: int) -> Tensor:
    """Sum words, each times 2 x column + 1 + (an even number) x (the place of its row's first word)."""
    num_rows, num_columns = rows.shape
    columns = torch.arange(num_columns, device=rows.device) * 2 + 1
    places = (torch.arange(num_rows, device=rows.device) * _ROW + first) * 0x3C6EF372FE94F82A
    return (rows.sum(0) * columns).sum() + (rows.sum(1) * places).sum()
