"""An HTTP proxy that stands before an object store and injects faults into a share of the requests.

Each client connection carries one request (its answer says `Connection: close`), so that a torn connection is one torn request.
The Host header goes on as it came: S3 signs it. Run it for a benchmark with
`python -m tests.fault_proxy --target http://127.0.0.1:8333 --share 0.2 --seed 1 --port 8334`.
"""

import argparse
import asyncio
import json
import random
import signal
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NoReturn
from urllib.parse import urlsplit

KINDS = {
    "500": "an S3 InternalError; the store never saw the request",
    "503": "an S3 SlowDown; the store never saw the request",
    "delay": "the request goes on after `delay_s`",
    "torn_before": "the connection is torn before the store saw the request",
    "torn_request": "the connection is torn when half of the body was passed on (requests with a body)",
    "torn_after": "the connection is torn when the store has done what was asked: only the answer is lost",
    "torn_body": "the connection is torn in the middle of the answer's body (GETs)",
}
ERRORS = {
    "500": ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    "503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
}
BLOCK = 1 << 16
LONGEST_HEAD = 1 << 16


class Torn(Exception):
    """One side of a connection went away: the other is torn too."""


class FaultProxy:
    """A proxy in a thread of its own, as a context manager; `url` is what clients use for the store's endpoint.

    share: of the requests that get a fault, drawn by `seed` from `kinds` (those that fit the request). May be changed while it
    runs. `requests` and `injected` count requests and faults by kind. `next_faults` is a queue of (method, kind) for single
    requests, which come before the share; kind "none": one without. `when_torn` is called with the kind, in a thread, at the
    moment before a connection is torn: to kill the server in the middle of an upload.
    """

    def __init__(
        self,
        target: str,
        *,
        share: float = 0.2,
        seed: int = 0,
        delay_s: float = 0.5,
        kinds: Sequence[str] = tuple(KINDS),
        port: int = 0,
    ):
        parts = urlsplit(target)
        self.host, self.target_port = parts.hostname or "127.0.0.1", parts.port or 80
        self.share, self.delay_s, self.kinds, self.port = share, delay_s, tuple(kinds), port
        self.requests, self.injected = 0, Counter[str]()
        self.next_faults: deque[tuple[str, str]] = deque()
        self.when_torn: Callable[[str], object] | None = None
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)
        self._stop: asyncio.Event | None = None
        self._failed: BaseException | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self._ready.wait()
        if self._failed:
            raise self._failed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._failed = error
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        serving: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            serving.add(task)
            try:
                await self._answer(reader, writer)
            except (Torn, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                writer.transport.abort()
            finally:
                writer.close()
                serving.discard(task)

        server = await asyncio.start_server(accept, "127.0.0.1", self.port, limit=LONGEST_HEAD)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._stop.wait()
        for task in list(serving):
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return  # a connection that was opened for nothing
        request, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method = request.split(" ", 1)[0]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = None if "chunked" in headers.get("transfer-encoding", "") else int(headers.get("content-length", 0))
        if "100-continue" in headers.get("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        hop = ("connection:", "expect:", "proxy-connection:")
        passed = [request, *(line for line in lines if not line.lower().startswith(hop)), "Connection: close"]
        fault = self._fault(method, length)
        if fault == "torn_before":
            await self._tear(fault)
        if fault in ERRORS:
            async for _ in _body(reader, length):
                pass
            writer.write(_error(fault, method))
            await writer.drain()
            return
        if fault == "delay":
            await asyncio.sleep(self.delay_s)
        try:
            from_store, to_store = await asyncio.open_connection(self.host, self.target_port, limit=LONGEST_HEAD)
        except OSError as error:
            raise Torn from error  # as if there were no proxy
        try:
            to_store.write("\r\n".join([*passed, "", ""]).encode("latin-1"))
            await self._pass_body(reader, length, to_store, half=fault == "torn_request")
            await self._pass_answer(from_store, writer, fault)
        finally:
            to_store.transport.abort() if fault == "torn_request" else to_store.close()

    def _fault(self, method: str, length: int | None) -> str | None:
        self.requests += 1
        fault = None
        if self.next_faults and self.next_faults[0][0] == method:
            fault = self.next_faults.popleft()[1]
        elif self._random.random() < self.share:
            fits = [
                kind
                for kind in self.kinds
                if (kind != "torn_body" or method == "GET") and (kind != "torn_request" or length is None or length > 1)
            ]
            fault = self._random.choice(fits) if fits else None
        if fault == "none":
            return None
        if fault:
            self.injected[fault] += 1
        return fault

    async def _tear(self, kind: str) -> NoReturn:
        if self.when_torn is not None:
            await asyncio.to_thread(self.when_torn, kind)
        raise Torn

    async def _pass_body(
        self, reader: asyncio.StreamReader, length: int | None, to_store: asyncio.StreamWriter, half: bool
    ) -> None:
        passed = 0
        try:
            async for block in _body(reader, length):
                if half and passed + len(block) > (length or 0) / 2:
                    to_store.write(block[: len(block) // 2])
                    await to_store.drain()
                    await self._tear("torn_request")
                to_store.write(block)
                await to_store.drain()
                passed += len(block)
        except ConnectionError:  # of the store, which may have answered before it had read all
            async for _ in _body(reader, None if length is None else max(0, length - passed - BLOCK)):
                pass

    async def _pass_answer(
        self, from_store: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str | None
    ) -> None:
        if fault == "torn_after":
            await from_store.read(-1)
            await self._tear(fault)
        if fault == "torn_body":
            head, _, body = (await from_store.read(-1)).partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n" + body[: len(body) // 2])
            await writer.drain()
            await asyncio.sleep(0.05)  # what is written gets there before the tear
            await self._tear(fault)
        answered = False
        while block := await from_store.read(BLOCK):
            answered = True
            writer.write(block)
            await writer.drain()
        if not answered:
            raise Torn


async def _body(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
    """A request's body in blocks, as it stands on the wire; `length` None: in HTTP chunks."""
    if length is None:
        while True:
            line = await reader.readline()
            size = int(line.partition(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
            if size == 0:
                return
    while length:
        block = await reader.read(min(BLOCK, length))
        if not block:
            raise Torn
        length -= len(block)
        yield block


def _error(kind: str, method: str) -> bytes:
    status, code, message = ERRORS[kind]
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + ("" if method == "HEAD" else body)).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True, help="the store's endpoint, such as http://127.0.0.1:8333")
    parser.add_argument("--share", type=float, default=0.2, help="of the requests that get a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0, help="to listen on; 0: a free one, which is printed")
    parser.add_argument("--delay", type=float, default=0.5, help="seconds of the fault 'delay'")
    parser.add_argument("--kinds", default=",".join(KINDS), help="; ".join(f"{kind}: {KINDS[kind]}" for kind in KINDS))
    asked = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    proxy = FaultProxy(
        asked.target,
        share=asked.share,
        seed=asked.seed,
        delay_s=asked.delay,
        kinds=asked.kinds.split(","),
        port=asked.port,
    )
    with suppress(KeyboardInterrupt), proxy:
        print(proxy.url, flush=True)
        stop.wait()
    print(json.dumps({"requests": proxy.requests, "injected": dict(sorted(proxy.injected.items()))}), flush=True)


if __name__ == "__main__":
    main()
