"""Web servers that speak the route of the real ones, and answer what they are made to."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec

from megatron_fipo.engines.generate_messages import GENERATE_PATH, GenerateRequest
from megatron_fipo.rollout.generator import EngineGenerator
from tests.rollout.engines import VOCABULARY, serving_pool
from tests.rollout.made_up_answers import VERSION, Server


@contextmanager
def client_of(
    directory: Path, *answers: Server, silent_for: dict[int, int] | None = None
) -> Iterator[tuple[EngineGenerator, list[str]]]:
    """A client of web servers that answer like this each time, and what the pool has warned of.

    `silent_for`: how many signs of life a server does not give, by its index.
    """
    silent = dict(silent_for or {})

    def handler(index: int, answer: Server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                content = b'{"world_size": 1, "weight_version": "0"}'
                if self.path == GENERATE_PATH:
                    content = b"".join(answer(msgspec.json.decode(body, type=GenerateRequest)))
                elif silent.get(index, 0):
                    silent[index] -= 1
                    self.send_error(500)
                    return
                self._send(content)

            def do_GET(self) -> None:
                self._send(b'{"world_size": 1, "weight_version": "0"}')

            def _send(self, content: bytes) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        return Handler

    webs = [ThreadingHTTPServer(("127.0.0.1", 0), handler(*pair)) for pair in enumerate(answers)]
    warnings: list[str] = []
    try:
        for web in webs:
            threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        addresses = [f"http://127.0.0.1:{web.server_port}" for web in webs]
        pool = serving_pool(addresses, directory, warn=warnings.append)
        pool.note_version(VERSION)
        with EngineGenerator(pool, vocab_size=VOCABULARY) as client:
            yield client, warnings
    finally:
        for web in webs:
            web.shutdown()
            web.server_close()
