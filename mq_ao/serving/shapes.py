"""Answers as OpenAI's protocol has them, whole and as streams of events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mq_ao.serving.answers import Answer
from mq_ao.serving.limits import Refused


class Texts:
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


class Conversation:
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


def usage_of(answers: list[Answer]) -> dict[str, int]:
    read, written = (sum(sizes) for sizes in zip(*((len(item.prompt), item.count) for item in answers), strict=True))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def events(answer: Answer, head: dict[str, Any], shape: Texts | Conversation, usage: bool) -> Iterator[str]:
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
            yield event([], usage=usage_of([answer]))
    except Refused as error:
        yield f"data: {json.dumps(error.content)}\n\n"
    yield "data: [DONE]\n\n"
