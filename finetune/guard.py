"""Which requests the server of finetune/demo.py answers: those of its own page, of a bounded size. Gradio has routes
for uploads, files and more, and answers to any name that leads to this machine; such requests never reach it."""

import asyncio
import json
import math
import re
import socket
import sys
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kozero.errors import first_line

READ = re.compile(
    r"/|/config|/(gradio_api/)?theme\.css|/manifest\.json|/favicon\.ico|/(assets|static|svelte)(/(?!\.)[\w.@+-]+)+"
    r"|/gradio_api/(app_id|info|startup-events|queue/data|heartbeat/\w+)"
)
SENT = re.compile(r"/gradio_api/(queue/join|cancel)")
BODY_BYTES = 1 << 18  # a prompt of 20,000 characters takes 240,000 where each is escaped as two numbers
BODY_SECONDS = HEAD_SECONDS = 20.0
NOT_OWN = "not asked for by a name of this server: open its address in numbers, or start it with --host NAME"


class Refused(Exception):
    """Holds the status of HTTP that tells why, and words where the status has not enough."""


class Guard:
    """ASGI middleware around Gradio's application.

    Args: host: address or name that the server listens on; num_values: numbers of a request to write.
    """

    def __init__(self, app: ASGIApp, host: str, num_values: int) -> None:
        self.app, self.num_values, host = app, num_values, host.strip("[]").lower()
        self.anywhere = host in ("0.0.0.0", "::")
        self.names = {"localhost", "127.0.0.1", "::1", host, *([socket.gethostname().lower()] if self.anywhere else [])}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it. Of an error its status alone is told; Gradio would tell Python's message."""
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, told = 0, []

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if status < 400:
                await send(message)

        try:
            self.check(scope)
            if scope["method"] == "POST":
                receive = replayed(await self.body(scope["path"], receive), receive)
            await self.app(scope, receive, answer)
        except Refused as refused:
            status, *told = refused.args
        except Exception as error:
            print(f"{scope['path']}: {first_line(error)}", file=sys.stderr, flush=True)
            status = status or 500
        if status >= 400:
            await JSONResponse({"detail": (told or [HTTPStatus(status).phrase])[0]}, status)(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Refuse what the page never asks for, and what another page asks for: by a name of its own that leads to this
        machine (DNS rebinding), or from its own origin."""
        headers, path = Headers(scope=scope), scope["path"]
        routes = {"GET": READ, "HEAD": READ, "POST": SENT}.get(scope["method"])
        if not (routes and routes.fullmatch(path)):
            raise Refused(404)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self.is_own(hosts[0]):
            raise Refused(403, NOT_OWN)
        same = all(origin.partition("://")[2] == hosts[0] for origin in origins)
        if not same or (path != "/" and headers.get("sec-fetch-site") in ("cross-site", "same-site")):
            raise Refused(403)

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this machine, at any port, as ports are forwarded. A server that listens on all
        addresses takes any: a page can rebind a name of its own, but no address."""
        found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\d.]+)|([\w.-]+))(?::\d+)?", host.lower(), re.ASCII)
        v6, v4, name = found.groups() if found else (None, None, None)
        return (v6 or v4 or name) in self.names or (self.anywhere and bool(v6 or v4))

    async def body(self, path: str, receive: Receive) -> bytes:
        """The body of a request.

        Raises: Refused when it is too large, comes too slowly or is not what the page would say.
        """
        found = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    found, more = found + message.get("body", b""), message.get("more_body", False)
                    if len(found) > BODY_BYTES:
                        raise Refused(413)
        except TimeoutError:
            raise Refused(408) from None
        if not self.is_pages(path, found):
            raise Refused(400)
        return found

    def is_pages(self, path: str, body: bytes) -> bool:
        """Whether the page would say that: `write` is its first function, of a prompt and numbers."""
        try:
            said = json.loads(body)
            if not (re.fullmatch(r"[\w-]{1,64}", said["session_hash"]) and said["fn_index"] == 0):
                return False
            prompt, *numbers = said["data"] if path.endswith("/join") else [None] * (1 + self.num_values)
            finite = all(number is None or (type(number) is not bool and math.isfinite(number)) for number in numbers)
            return isinstance(prompt, str | None) and len(numbers) == self.num_values and finite
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return False


def timed(protocol: type) -> type:
    """A protocol of uvicorn, which waits for ever for a head, that hangs up when none has come for HEAD_SECONDS."""

    class Timed(protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.loop.call_later(HEAD_SECONDS, self.look, None)

        def look(self, before: object) -> None:
            if self.cycle is before and (before is None or before.response_complete):
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(HEAD_SECONDS, self.look, self.cycle)

    return Timed


def replayed(body: bytes, receive: Receive) -> Receive:
    """Messages that begin with a body that was received already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again
