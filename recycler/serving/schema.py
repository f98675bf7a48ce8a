"""What may be asked: OpenAI's two bodies, as far as they are served, and `recycle` beside them.

A field that is not known is refused and not ignored, and so is one that would have to be, unless it says what holds anyway: clients
send back messages as they got them, with a null in every field. Fields that only say who asks are read over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)


def _not_served(value: Any) -> Any:
    if value not in (None, "", {}, [], "none", "auto", ["text"]):
        raise ValueError("this is not served; leave it out")
    return value


NotServed = Annotated[Any, AfterValidator(_not_served)]


def _either(what: str) -> WrapValidator:
    """One sentence where a union would list what is wrong with each of its members."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"give {what}") from None

    return WrapValidator(check)


_Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stops = Annotated[
    Union[_Stop, Annotated[list[_Stop], Field(max_length=16)], None],  # noqa: UP007  (a runtime alias)
    _either("a text of 1 to 200 characters, or at most 16 of them"),
]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Recycle(_Body):
    """
    Attributes:
        mixture: adapter → weight, instead of what the router says; {} is the base.
        task: which task this is, for a router that wants to be told (`oracle`).
    """

    mixture: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1000)
    task: str | None = None


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Request(_Body):
    """What both bodies share.

    Attributes:
        model: the routed model's name, an adapter's, or "base".
    """

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=64)
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    recycle: Recycle | None = None

    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    suffix: NotServed = None
    logit_bias: NotServed = None
    tools: NotServed = None
    tool_choice: NotServed = None
    functions: NotServed = None
    function_call: NotServed = None
    modalities: NotServed = None
    audio: NotServed = None
    prediction: NotServed = None
    reasoning_effort: NotServed = None
    verbosity: NotServed = None
    web_search_options: NotServed = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _no_penalty(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("penalties are not served; leave it out")
        return value

    @model_validator(mode="after")
    def _streams(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


Token = Annotated[int, Field(ge=0, lt=2**31)]
Prompt = Annotated[
    Union[str, Annotated[list[str], Field(min_length=1)], list[Token], list[list[Token]]],  # noqa: UP007  (a runtime alias)
    _either("a text, texts, a prompt's token ids, or lists of them"),
]


class CompletionRequest(Request):
    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None

    @field_validator("echo", "best_of")
    @classmethod
    def _plain(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (1 if info.field_name == "best_of" else 0):
            raise ValueError("this is not served; leave it out")
        return value

    @property
    def top(self) -> int | None:
        return self.logprobs


class Part(_Body):
    type: Literal["text"]
    text: str


Content = Annotated[
    Union[str, list[Part]],  # noqa: UP007  (a runtime alias)
    _either('a text, or parts {"type": "text", "text": ...}'),
]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    refusal: NotServed = None
    tool_calls: NotServed = None
    tool_call_id: NotServed = None
    function_call: NotServed = None
    audio: NotServed = None
    annotations: NotServed = None

    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Any = None

    @model_validator(mode="after")
    def _with_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        return self

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
