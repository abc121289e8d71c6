"""Serve a report on this machine and make it again whenever its files change."""

import http.server
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from blipfit.errors import UserError

HOST = "127.0.0.1"
INTERVAL = 1.0
"""Seconds between two looks at the files."""
_SUFFIXES = (".json", ".jsonl", ".yaml")
_MAX_DEPTH = 5

Snapshot = tuple[tuple[str, int, int], ...]
"""Path, time of the last change and size of every file."""


def take_snapshot(paths: Sequence[Path]) -> Snapshot:
    """The state of all result files at the paths and below them; data folders and adapters are not visited."""
    return tuple(sorted(entry for path in paths for entry in _list_files(path, _MAX_DEPTH)))


def _list_files(path: Path, depth: int) -> Iterator[tuple[str, int, int]]:
    try:
        if path.is_dir():
            is_visited = depth > 0 and path.name not in ("data", "adapter", "checkpoint")
            entries = sorted(path.iterdir()) if is_visited else []
            for entry in entries:
                if not entry.name.startswith("."):
                    yield from _list_files(entry, depth - 1)
        elif path.suffix in _SUFFIXES:
            status = path.stat()
            yield str(path), status.st_mtime_ns, status.st_size
    except OSError:  # deleted meanwhile
        return


class ReportServer(http.server.ThreadingHTTPServer):
    """Serves one page at `/` and its version number at `/version`, to this machine only."""

    daemon_threads = True

    def __init__(self, port: int, render: Callable[[], str], paths: Sequence[Path]):
        """`port` 0 is any free port. Raises UserError if the port is in use."""
        self.render, self.paths = render, paths
        self.version = 0
        self.page = b""
        self.stopped = threading.Event()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"port {port} cannot be used ({reason}); choose another one with --port") from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def rebuild(self) -> None:
        """Make the page again."""
        self.page = self.render().encode("utf-8")
        self.version += 1

    def watch(self) -> None:
        """Serve until an exception (a signal) arrives, and make the page again when a file has changed."""
        snapshot = take_snapshot(self.paths)
        self.rebuild()
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            while not self.stopped.wait(INTERVAL):
                if (current := take_snapshot(self.paths)) != snapshot:
                    snapshot = current
                    self.rebuild()
        finally:
            self.shutdown()
            self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer with the page or its version; only to addresses of this machine (no other name that leads here)."""
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in (HOST, "localhost"):
            self.send_error(403)
        elif self.path == "/":
            self._send("text/html; charset=utf-8", self.server.page)
        elif self.path == "/version":
            self._send("text/plain", str(self.server.version).encode())
        else:
            self.send_error(404)

    def _send(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed for each request."""
