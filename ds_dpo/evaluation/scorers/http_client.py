"""Posts JSON to a server: each wait has an end, what may pass is tried again, and no message holds the key."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

from ds_dpo.errors import ScorerError, cut

MAX_ANSWER_BYTES = 2**22
MAX_WAIT_SECONDS = 60.0
CONNECT_SECONDS = 20.0
PASSING = (408, 425, 429, 500, 502, 503, 504, 529)
# of one image or prompt, such as by a filter of contents
REFUSING = (400, 413, 415, 422)


class RefusedError(Exception):
    """The server does not take this question; it may take others."""


class _PassingError(Exception):
    """A failure that may not happen again. wait_seconds: what the server asks for."""

    def __init__(self, what: str, *, wait_seconds: float = 0.0) -> None:
        super().__init__(what)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Retries:
    """number: of further tries. backoff_seconds: before the first of them, then twice as long each time."""

    number: int
    backoff_seconds: float
    timeout_seconds: float


class Client:
    """A server at a URL. It may be used by several threads at once."""

    def __init__(self, *, url: str, scorer: str, key: str | None, retries: Retries) -> None:
        self._url = url
        self._scorer = scorer
        self._key = key
        self._retries = retries
        self._local = threading.local()
        self._stopped = threading.Event()
        parts = urlsplit(url)
        self.place = f"{parts.scheme}://{parts.netloc}{parts.path}"

    def post(self, body: dict[str, Any]) -> str:
        """Return the text of the answer. Raises RefusedError for this body, ScorerError once all tries have failed."""
        for attempt in range(self._retries.number + 1):
            try:
                return self._try(body)
            except _PassingError as error:
                last = str(error)
                wait = max(error.wait_seconds, self._retries.backoff_seconds * 2**attempt * random.uniform(0.8, 1.2))
            if attempt < self._retries.number and self._stopped.wait(min(wait, MAX_WAIT_SECONDS)):
                break
        tries = self._retries.number + 1
        raise ScorerError(
            f"scorer {self._scorer}: {self.place} gave no answer in {tries} tries; the last one: {last}; what it has "
            "answered so far is kept, so start again once it works"
        )

    def give_up(self) -> None:
        """Let no thread wait for a further try."""
        self._stopped.set()

    def _try(self, body: dict[str, Any]) -> str:
        deadline = time.monotonic() + self._retries.timeout_seconds
        try:
            with self._session().post(
                self._url,
                json=body,
                auth=self._sign,
                stream=True,
                allow_redirects=False,  # a redirected POST becomes a GET
                timeout=(min(CONNECT_SECONDS, self._retries.timeout_seconds), self._retries.timeout_seconds),
            ) as response:
                content = self._read(response, deadline)
        except requests.exceptions.InvalidURL as error:
            raise ScorerError(f"scorer {self._scorer}: {self.place} is no URL ({cut(str(error))})") from None
        except requests.exceptions.SSLError as error:
            raise ScorerError(
                f"scorer {self._scorer}: {self.place} has no certificate that is trusted ({self._harmless(str(error))})"
            ) from None
        except requests.exceptions.Timeout:
            raise _PassingError(f"no answer for {self._retries.timeout_seconds:g} s") from None
        except (requests.exceptions.RequestException, OSError) as error:
            raise _PassingError(f"{type(error).__name__} ({self._harmless(str(error))})") from None
        text = content.decode("utf-8", errors="replace")
        if response.status_code == 200:
            return text
        said = f"status {response.status_code} ({self._harmless(text) or response.reason})"
        if response.status_code in PASSING:
            raise _PassingError(said, wait_seconds=_seconds(response.headers.get("Retry-After")))
        message = f"scorer {self._scorer}: {self.place} answered with {said}"
        if response.status_code in REFUSING:
            raise RefusedError(message)
        advice = "; check api_key_variable" if response.status_code in (401, 403) else "; check its URL and settings"
        raise ScorerError(message + advice)

    def _read(self, response: requests.Response, deadline: float) -> bytes:
        """Read an answer to its end, however slowly it comes. Raises _PassingError, OSError, RequestException."""
        content = bytearray()
        while True:
            chunk = response.raw.read1(2**16, decode_content=True)
            if not chunk:
                return bytes(content)
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise _PassingError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > deadline:
                raise _PassingError(f"no whole answer for {self._retries.timeout_seconds:g} s")

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        session: requests.Session = self._local.session
        return session

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _harmless(self, text: str) -> str:
        return cut(text.replace(self._key, "***") if self._key else text)


def _seconds(text: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 for none, and for a date."""
    try:
        return max(0.0, min(float(text or 0), MAX_WAIT_SECONDS))
    except ValueError:
        return 0.0
