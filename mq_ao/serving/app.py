"""The routes: `/v1/completions`, `/v1/chat/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
import json
import queue
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from mq_ao.errors import MqAoError
from mq_ao.opening import Opened
from mq_ao.serving.engine import Engine, Job, QueueFull
from mq_ao.serving.requests import Asked, Chat, Completion, parsed
from mq_ao.writing import until


@dataclass(frozen=True)
class Limits:
    """What one client may ask for, and all together.

    Attributes:
        batch: sequences that are decoded at a time.
        queue: requests that may wait besides.
        prompt: tokens of a prompt.
        new_tokens: tokens of an answer.
        body: bytes of a request.
        seconds: that an answer may take.
        prefix_bytes: of states that are kept for beginnings of prompts.
    """

    batch: int = 32
    queue: int = 256
    prompt: int = 32768
    new_tokens: int = 4096
    body: int = 2**20
    seconds: float = 600.0
    prefix_bytes: int = 2**28


class Refused(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        kind: as OpenAI names it.
    """

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    @property
    def content(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": None}}


class Answer:
    """The text of one prompt, piece by piece.

    Args:
        server: whose model writes it.
        prompt: tokens.
        asked: how.
        most: tokens at most.
    """

    def __init__(self, server: Server, prompt: list[int], asked: Asked, most: int) -> None:
        self._server, self._asked, self._most = server, asked, most
        self.prompt, self.count = prompt, 0
        self.finish = "stop"
        self._tokens: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()
        self._end = server.codec.end_token
        self._job = Job(torch.tensor(prompt), most, server.opened.sampling(asked.sampling()), self._tokens.put)
        server.engine.submit(self._job)

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._job.cancelled.set()

    def pieces(self) -> Iterator[str]:
        """Text as soon as it is certain.

        Raises:
            Refused: it took too long.
        """
        made = written = 0

        def pieces() -> Iterator[str]:
            nonlocal made
            for piece in self._server.codec.pieces(self._received(), self.prompt):
                made += len(piece)
                yield piece

        try:
            for piece in until(pieces(), self._asked.stops):
                written += len(piece)
                yield piece
            if made > written:
                self.finish = "stop"  # at one of its strings
        finally:
            # After a stop string there is more on its way, which nobody reads.
            self.cancel()

    def whole(self) -> str:
        """All of the text."""
        return "".join(self.pieces())

    def _received(self) -> Iterator[int]:
        deadline = time.monotonic() + self._server.limits.seconds
        while True:
            try:
                token = self._tokens.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise Refused(504, f"the answer took over {self._server.limits.seconds:g} s.", "timeout") from None
            if token is None:
                return
            if isinstance(token, Exception):
                raise Refused(500, f"the model failed: {token}", "server_error") from token
            self.count += 1
            if token == self._end:
                continue
            if self.count == self._most:
                self.finish = "length"
            yield token


class Server:
    """A model behind the routes.

    Args:
        opened: it, and how it reads text.
        name: as clients call it.
        limits: what they may ask for.
        key: that they have to send; None: none.

    Raises:
        MqAoError: the model has no states that several requests could have, or no tokenizer is known.
    """

    def __init__(self, opened: Opened, name: str, limits: Limits | None = None, key: str | None = None) -> None:
        carried = getattr(opened.run, "carried", None)
        if carried is None:
            raise MqAoError(
                f"{opened.source} cannot be served: it keeps the state of one text alone, or none. Give a .pt2 or .ptc "
                "program, or a float model."
            )
        self.opened, self.name, self.key = opened, name, key
        self.limits = limits or Limits()
        self.codec = opened.needed_codec
        self.engine = Engine(opened.run, carried, self.limits.batch, self.limits.queue, self.limits.prefix_bytes)
        self.started = int(time.time())

    def app(self) -> FastAPI:
        """The application, for any server of ASGI."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            # A thread for each answer, which waits for its tokens.
            current_default_thread_limiter().total_tokens = self.limits.batch + self.limits.queue + 8
            yield
            await run_in_threadpool(self.engine.close)

        app = FastAPI(title="mq-ao", lifespan=lifespan)

        @app.exception_handler(Refused)
        async def refused(_: Request, error: Refused) -> JSONResponse:
            return JSONResponse(error.content, error.status)

        @app.get("/v1/models")
        async def models(request: Request) -> dict[str, Any]:
            self._check_key(request)
            described = {"id": self.name, "object": "model", "created": self.started, "owned_by": "mq-ao"}
            return {"object": "list", "data": [described]}

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            asked: Completion = await self._asked(Completion, request)
            prompts = [self._encoded(prompt) for prompt in asked.prompts]
            if not prompts:
                raise Refused(400, "prompt: there is none.")
            if asked.stream and len(prompts) > 1:
                raise Refused(400, "a stream answers one prompt: send them one by one.")
            before = [self._text(prompt) if asked.echo else "" for prompt in prompts]
            return await self._answered(request, asked, prompts, asked.max_tokens, _Texts(before))

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            asked: Chat = await self._asked(Chat, request)
            prompt = self._checked(self._conversation(asked))
            most = asked.max_completion_tokens or asked.max_tokens or self.limits.new_tokens
            return await self._answered(request, asked, [prompt], most, _Chat())

        return app

    async def _asked(self, kind: type[Asked], request: Request) -> Any:
        self._check_key(request)
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > self.limits.body:
                raise Refused(413, f"the request is larger than {self.limits.body} bytes: send less.")
        try:
            asked = parsed(kind, content)
        except MqAoError as error:
            raise Refused(400, str(error)) from None
        if asked.model not in (None, self.name):
            raise Refused(404, f"there is no model {asked.model!r} here, but {self.name!r}.", "not_found_error")
        return asked

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not secrets.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "the API key is missing or wrong.", "authentication_error")

    def _encoded(self, prompt: str | list[int]) -> list[int]:
        tokens = prompt if isinstance(prompt, list) else self.codec.encode(prompt)
        if isinstance(prompt, str) and self.codec.start_token is not None:
            tokens = [self.codec.start_token, *tokens]
        return self._checked(tokens)

    def _checked(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise Refused(400, "prompt: it is empty.")
        if len(tokens) > self.limits.prompt:
            raise Refused(400, f"prompt: it has {len(tokens)} tokens, and {self.limits.prompt} is the most.")
        if min(tokens) < 0 or max(tokens) >= self.opened.vocab_size:
            raise Refused(400, f"prompt: it has tokens outside of 0..{self.opened.vocab_size - 1}.")
        return tokens

    def _conversation(self, asked: Chat) -> list[int]:
        try:
            text = self.codec.conversation([message.model_dump() for message in asked.messages])
        except Exception as error:  # of the template
            raise Refused(400, f"messages: the chat template refuses them ({error}).") from None
        if text is None:
            raise Refused(400, "this model's tokenizer has no chat template: use /v1/completions.")
        return self.codec.encode(text)

    def _text(self, tokens: list[int]) -> str:
        return "".join(self.codec.pieces(tokens))

    async def _answered(
        self, request: Request, asked: Asked, prompts: list[list[int]], most: int, shape: _Texts | _Chat
    ) -> Response:
        if most > self.limits.new_tokens:
            raise Refused(400, f"max_tokens: {most} is over {self.limits.new_tokens}, the most here.")
        answers: list[Answer] = []
        try:
            answers = [Answer(self, prompt, asked, most) for prompt in prompts]
        except QueueFull as error:
            raise Refused(429, str(error), "rate_limit_error") from None
        except MqAoError as error:
            raise Refused(503, str(error), "server_error") from None
        head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            events = _events(answers[0], head, shape, asked.wants_usage)
            return StreamingResponse(_while_there(request, events, answers[0]), media_type="text/event-stream")
        texts = await _unless_gone(request, answers)
        pairs = enumerate(zip(texts, answers, strict=True))
        choices = [shape.whole(index, text, answer) for index, (text, answer) in pairs]
        return JSONResponse({**head, "object": shape.kind, "choices": choices, "usage": _usage(answers)})


class _Texts:
    """The shape of `/v1/completions`."""

    kind, part, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, before: list[str]) -> None:
        self._before = before

    def whole(self, index: int, text: str, answer: Answer) -> dict[str, Any]:
        """A choice."""
        return {"index": index, "text": self._before[index] + text, "logprobs": None, "finish_reason": answer.finish}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return self.piece(self._before[0], None) if self._before[0] else None

    def piece(self, text: str, finish: str | None) -> dict[str, Any]:
        """A part of a choice."""
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


class _Chat:
    """The shape of `/v1/chat/completions`."""

    kind, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, index: int, text: str, answer: Answer) -> dict[str, Any]:
        """A choice."""
        return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": answer.finish}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, text: str, finish: str | None) -> dict[str, Any]:
        """A part of a choice."""
        return {"index": 0, "delta": {"content": text} if finish is None else {}, "finish_reason": finish}


def _usage(answers: list[Answer]) -> dict[str, int]:
    read, written = (sum(sizes) for sizes in zip(*((len(item.prompt), item.count) for item in answers), strict=True))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _events(answer: Answer, head: dict[str, Any], shape: _Texts | _Chat, usage: bool) -> Iterator[str]:
    """Server-sent events."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'object': shape.part, 'choices': choices, **more})}\n\n"

    try:
        if (first := shape.first()) is not None:
            yield event([first])
        for piece in answer.pieces():
            yield event([shape.piece(piece, None)])
        yield event([shape.piece("", answer.finish)])
        if usage:
            yield event([], usage=_usage([answer]))
    except Refused as error:
        yield f"data: {json.dumps(error.content)}\n\n"
    yield "data: [DONE]\n\n"


async def _while_there(request: Request, events: Iterator[str], answer: Answer) -> AsyncIterator[str]:
    """Events, until the client is gone; then the work stops."""
    try:
        async for event in iterate_in_threadpool(events):
            if await request.is_disconnected():
                return
            yield event
    finally:
        answer.cancel()


async def _unless_gone(request: Request, answers: list[Answer]) -> list[str]:
    """All texts; the work stops where the client is gone."""
    work = asyncio.gather(*(run_in_threadpool(answer.whole) for answer in answers))
    while True:
        done, _ = await asyncio.wait([work], timeout=0.5)
        if done:
            return list(work.result())
        if await request.is_disconnected():
            for answer in answers:
                answer.cancel()
