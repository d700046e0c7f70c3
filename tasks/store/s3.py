"""How s3fs talks to S3: it notices within half a minute that nothing moves, and leaves patience to `persistence`.

Left alone, aiohttp's read timeout starts only when a request is sent whole: a store that stops reading, or never answers
`Expect: 100-continue`, would hold an upload for ever. And s3fs and botocore, each trying five times, would sit out 25 timeouts
before anyone heard of the first.
"""

import socket
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from fsspec.config import conf

STALL_S = 15
REQUESTS = 3  # botocore's own: one part of many in a large upload is repeated alone


class Session(AIOHTTPSession):
    """Sends the body at once instead of waiting, without a limit, for leave to send it (no part of what is signed).

    And sends it once: aiohttp would repeat a PUT whose connection broke and tell nobody, so that a conditional one would be
    refused because of itself. botocore repeats it too, but says so.
    """

    async def _get_session(self, proxy_url: str | None) -> Any:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False
        return session

    async def send(self, request: Any) -> Any:
        if "Expect" in request.headers:
            del request.headers["Expect"]
        return await super().send(request)


def stalling_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket that fails when what was sent is not taken for `STALL_S` (where the system can: Linux)."""
    made = socket.socket(*address[:3])
    if option := getattr(socket, "TCP_USER_TIMEOUT", None):
        made.setsockopt(socket.IPPROTO_TCP, option, STALL_S * 1000)
    return made


def options() -> dict[str, Any]:
    """s3fs's `config_kwargs`; what the user's fsspec configuration says goes before."""
    ours = {
        "connect_timeout": 5,
        "read_timeout": STALL_S,
        "retries": {"total_max_attempts": REQUESTS},
        "http_session_cls": Session,
        "connector_args": {"socket_factory": stalling_socket},
    }
    theirs = conf.get("s3", {}).get("config_kwargs", {})
    return {**ours, **theirs}
