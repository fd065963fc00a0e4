"""SageMaker's runtime on this machine: boto3 asks it, and it asks whatever speaks the containers' contract."""

from __future__ import annotations

import binascii
import http.client
import json
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Iterable[bytes]]
"""Status, and the body in the pieces in which it is written."""


@contextmanager
def runtime(container: Callable[[bytes], Answer]) -> Iterator[str]:
    """Serve `container` (request body -> answer) as the runtime's endpoints; yields the address for boto3."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            status, pieces = container(self.rfile.read(int(self.headers["content-length"])))
            if status >= 400:  # as the service words what a container refused
                said = b"".join(pieces).decode()
                body = json.dumps({"Message": "refused by the container", "OriginalMessage": said}).encode()
                self._whole(424, body, {"x-amzn-ErrorType": "ModelError"})
            elif self.path.endswith("/invocations-response-stream"):
                self.send_response(200)
                self.send_header("Content-Type", "application/vnd.amazon.eventstream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in pieces:
                    message = event_message(piece)
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(message), message))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            else:
                self._whole(200, b"".join(pieces), {})

        def _whole(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def event_message(payload: bytes) -> bytes:
    """One PayloadPart in AWS's event stream encoding: lengths, checksum, headers, payload, checksum."""
    headers = b""
    for name, value in ((b":message-type", b"event"), (b":event-type", b"PayloadPart")):
        headers += bytes([len(name)]) + name + b"\x07" + struct.pack(">H", len(value)) + value
    message = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    message += struct.pack(">I", binascii.crc32(message)) + headers + payload
    return message + struct.pack(">I", binascii.crc32(message))


def forward(port: int) -> Callable[[bytes], Answer]:
    """A container that listens on this machine, asked at /invocations as SageMaker does."""

    def ask(body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, iter(lambda: response.read1(65536), b"")

    return ask
