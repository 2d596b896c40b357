"""The routes: `/v1/completions`, `/v1/chat/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from mq_ao.errors import MqAoError
from mq_ao.opening import Opened
from mq_ao.serving.answers import Answer
from mq_ao.serving.engine import Engine, QueueFull
from mq_ao.serving.limits import Limits, Refused
from mq_ao.serving.model_thread import ModelThread
from mq_ao.serving.requests import Asked, Chat, Completion, parsed
from mq_ao.serving.shapes import Conversation, Texts, events, usage_of


class Server:
    """A model behind the routes.

    Args:
        opened: it, and how it reads text.
        name: as clients call it.
        limits: what they may ask for.
        key: that they have to send; None: none.
        thread: that loaded the model, and is to run it.

    Raises:
        MqAoError: the model has no states that several requests could have, or no tokenizer is known.
    """

    def __init__(
        self,
        opened: Opened,
        name: str,
        limits: Limits | None = None,
        key: str | None = None,
        thread: ModelThread | None = None,
    ) -> None:
        carried = getattr(opened.run, "carried", None)
        if carried is None:
            raise MqAoError(
                f"{opened.source} cannot be served: it keeps the state of one text alone, or none. Give a .pt2, .ptn "
                "or .ptc program, or a float model."
            )
        self.opened, self.name, self.key = opened, name, key
        self.limits = limits or Limits()
        self.codec = opened.needed_codec
        sizes = (self.limits.batch, self.limits.queue, self.limits.prefix_bytes)
        self.engine = Engine(opened.run, carried, *sizes, thread)
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
            return await self._answered(request, asked, prompts, asked.max_tokens, Texts(before))

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            asked: Chat = await self._asked(Chat, request)
            prompt = self._checked(self._conversation(asked))
            most = asked.max_completion_tokens or asked.max_tokens or self.limits.new_tokens
            return await self._answered(request, asked, [prompt], most, Conversation())

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
        self, request: Request, asked: Asked, prompts: list[list[int]], most: int, shape: Texts | Conversation
    ) -> Response:
        if most > self.limits.new_tokens:
            raise Refused(400, f"max_tokens: {most} is over {self.limits.new_tokens}, the most here.")
        answers = self._submitted(prompts, asked, most)
        head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            stream = events(answers[0], head, shape, asked.wants_usage)
            return StreamingResponse(_while_there(request, stream, answers[0]), media_type="text/event-stream")
        texts = await _unless_gone(request, answers)
        pairs = enumerate(zip(texts, answers, strict=True))
        choices = [shape.whole(index, text, answer) for index, (text, answer) in pairs]
        return JSONResponse({**head, "object": shape.kind, "choices": choices, "usage": usage_of(answers)})

    def _submitted(self, prompts: list[list[int]], asked: Asked, most: int) -> list[Answer]:
        """Answers on their way to all of some prompts, or to none."""
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                answers.append(Answer(self.opened, self.engine, prompt, asked, most, self.limits.seconds))
        except MqAoError as error:
            for answer in answers:
                answer.cancel()
            if isinstance(error, QueueFull):
                raise Refused(429, str(error), "rate_limit_error") from None
            raise Refused(503, str(error), "server_error") from None
        return answers


async def _while_there(request: Request, stream: Iterator[str], answer: Answer) -> AsyncIterator[str]:
    """Events, until the client is gone; then the work stops."""
    try:
        async for event in iterate_in_threadpool(stream):
            if await request.is_disconnected():
                return
            yield event
    finally:
        answer.cancel()


async def _unless_gone(request: Request, answers: list[Answer]) -> list[str]:
    """All texts; the work stops where the client is gone."""
    work = asyncio.gather(*(run_in_threadpool(answer.whole) for answer in answers))
    try:
        while not work.done() and not await request.is_disconnected():
            await asyncio.wait([work], timeout=0.5)
    finally:
        # Where the client is gone or one has failed, nobody reads the others.
        for answer in answers:
            answer.cancel()
    return list(await work)
