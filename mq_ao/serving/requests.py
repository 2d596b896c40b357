"""What clients send, as OpenAI's protocol has it, checked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mq_ao.errors import MqAoError
from mq_ao.models.generate import Sampling

_IGNORED = frozenset({"model", "user", "stream_options", "store", "metadata"})


class Asked(BaseModel):
    """What both kinds of requests have in common. What is not known, and would change the answer, is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int = Field(1, ge=1, le=1)
    user: str | None = None

    def sampling(self) -> Sampling:
        """As OpenAI has it, where nothing is said tokens are drawn at temperature 1."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_k or 0, 1.0 if self.top_p is None else self.top_p, self.seed)

    @property
    def stops(self) -> list[str]:
        """Strings that end the text."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class Completion(Asked):
    """`/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


class Message(BaseModel):
    """One of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str


class Chat(Asked):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Chat:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self


def parsed(kind: type[Asked], content: bytes) -> Any:
    """A request of a kind from the bytes of its body.

    Raises:
        MqAoError: it is no JSON, lacks something, or asks for something that is not known.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        # Alternatives of a type add their names to the place.
        place = ".".join(str(part) for part in first["loc"][:1]) or "the body is not understood"
        raise MqAoError(f"{place}: {first['msg']}.") from None
