"""Fixtures that every test may use. Nothing here imports torch."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmalign.generate.server import ServerConfig


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of photographs and benchmark files that MMALIGN_REAL names."""
    folder = os.environ.get("MMALIGN_REAL", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set MMALIGN_REAL to a folder of photographs and benchmark files")
    return Path(folder)


@pytest.fixture(autouse=True)
def untouched_logger() -> None:
    """Each test finds the logger as importing leaves it, whatever an earlier one configured."""
    logger = logging.getLogger("mmalign")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@dataclass
class Reply:
    """What the server does with one request; `raw` replaces the whole body."""

    text: str = "fine"
    finish: str = "stop"
    status: int = 200
    raw: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    tokens: tuple[int, int] = (10, 5)

    def body(self) -> str:
        if self.raw is not None:
            return self.raw
        message = {"role": "assistant", "content": self.text}
        usage = {"prompt_tokens": self.tokens[0], "completion_tokens": self.tokens[1]}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return json.dumps({"choices": [choice], "usage": usage})


class Scripted(ThreadingHTTPServer):
    """A chat server on loopback, which does what a script says and remembers what it was asked.

    `script(body, number of the request)` gives the fields of a Reply.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: Callable[[dict[str, Any], int], dict[str, Any]] = lambda body, number: {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self) -> list[str]:
        """What each request said last."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def config(self, **settings: Any) -> ServerConfig:
        quick = {"backoff_seconds": 0.01, "timeout_seconds": 10.0, "max_retries": 2}
        return ServerConfig(**{"model": "m", "base_url": self.url, **quick, **settings})

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of some tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Scripted
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            number = len(server.bodies)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        reply = Reply(**server.script(body, number))
        time.sleep(reply.delay)
        with server.lock:
            server.at_once -= 1
        if reply.drop:
            self.close_connection = True
            self.connection.close()
            return
        data = reply.body().encode()
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (headers | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@pytest.fixture
def scripted(monkeypatch) -> Iterator[Scripted]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Scripted() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
