"""A server on this machine that judges images: it answers as each test says, and notes what it was asked."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Answer:
    """status and body of an answer. Before it comes, the server waits for seconds, or until it closes if hangs."""

    body: Any
    status: int = 200
    hangs: bool = False
    delay_seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class JudgeServer:
    """answer: from the number of the request, counted from 0, and its parsed body."""

    answer: Callable[[int, Any], Answer]
    url: str = ""
    bodies: list[Any] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def __enter__(self) -> JudgeServer:
        judge, lock = self, threading.Lock()
        self._closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(judge.bodies)
                    judge.bodies.append(body)
                    judge.keys.append(self.headers.get("Authorization"))
                answer = judge.answer(number, body)
                judge._closing.wait(None if answer.hangs else answer.delay_seconds)
                content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:
                """Say nothing of clients that are gone."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/chat/completions"
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def chat(text: str) -> dict[str, Any]:
    """Return a chat completion with a text."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def brightness_of(part: str) -> float:
    """Return the mean of an image's pixels, 0 to 255. part: base64 of a file, or a data URL."""
    content = base64.b64decode(part.rpartition(",")[2])
    return float(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).mean())


def chat_images(body: Any) -> list[str]:
    """Return the data URLs of a chat request's images."""
    return [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
