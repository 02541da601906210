"""A web server on loopback that serves a folder with byte ranges, and counts what it sends.

Run as a program of its own: GDAL holds Python's lock during some requests. Prints its port. GET /-/log gives the
requests since the last such question, and how many bytes were sent for each.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1])
LOG: list[tuple[str, str, int]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/-/log":
            content, status, headers = json.dumps(LOG).encode(), 200, {}
            LOG.clear()
        else:
            content, status, headers = self.part_of(FOLDER / path.lstrip("/"))
            LOG.append((self.command, self.path, len(content) if self.command == "GET" else 0))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def part_of(self, file: Path) -> tuple[bytes, int, dict[str, str]]:
        if not file.is_file():
            return b"", 404, {}
        content = file.read_bytes()
        if (asked := self.headers.get("Range")) is None:
            return content, 200, {}
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        return content[start:stop], 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
