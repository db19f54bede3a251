"""A loopback proxy in front of an S3 server that does what networks and clouds do: errors, stalls, cut connections."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>injected</Message></Error>'
FAULTS = ("500", "503", "reset before", "reset after", "cut", "slow")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
SLOW_SECONDS = 0.5


@dataclass
class Faults:
    """Which share of the requests goes wrong, and how; and what was asked and done."""

    share: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    seed: int = 0
    broken: bool = False
    """Every request is answered with 503."""
    broken_after: int | None = None
    """Broken from this many requests on."""
    injected: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def draw(self, kind: str) -> str | None:
        """What goes wrong with the next request."""
        with self._lock:
            self.requests[kind] += 1
            if self.broken_after is not None and self.requests.total() > self.broken_after:
                self.broken = True
            wrong = self.broken or self._random.random() < self.share
            fault = "503" if self.broken else self._random.choice(self.kinds)
            self.injected[fault] += wrong
            return fault if wrong else None


@contextmanager
def faulty(upstream: str, faults: Faults) -> Iterator[str]:
    """A proxy before the server at the URL; yields the proxy's URL."""
    address = urlsplit(upstream).netloc

    class Handler(_Handler):
        pass

    Handler.upstream, Handler.faults = address, faults
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    faults: Faults

    def log_message(self, *_: object) -> None:
        pass

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        fault = self.faults.draw(self._kind())
        if fault in {"500", "503"}:
            self._answer(int(fault), [], ERROR % (b"InternalError" if fault == "500" else b"SlowDown"))
            return
        if fault == "reset before":
            self._reset()
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        status, headers, answer = self._forward(body)
        if fault == "reset after":
            self._reset()  # What was asked is done, and whoever asked doesn't know.
            return
        self._answer(status, headers, answer, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815

    def _kind(self) -> str:
        query = parse_qs(urlsplit(self.path).query)
        return "LIST" if self.command == "GET" and "list-type" in query else self.command

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        length = {name.lower(): value for name, value in headers}.get("content-length", str(len(body)))
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
