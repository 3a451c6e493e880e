"""Prompts that are longer than a text encoder reads: counted, and said once."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from ds_dpo.process.say import Say

SHOWN_CHARACTERS = 60
DIGEST_BYTES = 8


class CutPrompts:
    """Counts the distinct prompts whose end a text encoder does not read, and says so at the first one."""

    def __init__(self, tokenizer: Any, *, max_tokens: int, say: Say) -> None:
        """max_tokens: number that the text encoder reads, with its start and end tokens."""
        self._tokenizer, self._max_tokens, self._say = tokenizer, max_tokens, say
        self._seen: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, prompts: Iterable[str]) -> None:
        """Look at prompts that are about to be encoded."""
        for prompt in prompts:
            text = prompt.encode(errors="replace")
            # a token is at least one byte, so most prompts need no second look
            if len(text) + 2 <= self._max_tokens:
                continue
            digest = blake2b(text, digest_size=DIGEST_BYTES).digest()
            if digest in self._seen:
                continue
            num_tokens = len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if num_tokens <= self._max_tokens:
                continue
            if not self._seen:
                self._say(
                    f"a prompt has {num_tokens} tokens, and the text encoder reads {self._max_tokens}: its end has no "
                    f"effect ({prompt[:SHOWN_CHARACTERS]!r}...); further ones are not named, scripts/data_stats.py "
                    "counts them"
                )
            self._seen.add(digest)
