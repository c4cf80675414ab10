"""The wire format of OpenAI's image API for DALL·E 2, and its errors."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import Request

MAX_PROMPT = 1000  # characters
MAX_IMAGES = 10
SIDES = {"64x64": 64, "256x256": 256, "512x512": 512, "1024x1024": 1024}
MAX_SEED = 2**63 - 1 - MAX_IMAGES
# The error types of OpenAI's servers, by status.
TYPES = {401: "invalid_request_error", 429: "requests", 500: "server_error", 503: "server_error", 504: "server_error"}

MAX_KEYS = 50

Headers = Mapping[str, str] | None
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, pattern=r"\S")]


class _ImageRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _limit_keys(cls, body: Any) -> Any:
        """Bounds the number of keys, because each unknown one would be an error and a body can hold a million."""
        if isinstance(body, dict) and len(body) > MAX_KEYS:
            raise ValueError(f"at most {MAX_KEYS} fields, got {len(body)}")
        return body

    model: Annotated[str, Field(max_length=200)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    size: Literal["64x64", "256x256", "512x512", "1024x1024"] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    quality: Literal["standard", "auto"] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="Of the first image; the next ones count up.")] | None = None


class Generation(_ImageRequest):
    """`POST /v1/images/generations`; `seed` is this server's own."""

    model_config = ConfigDict(strict=True)

    prompt: Prompt


class Edit(_ImageRequest):
    """`POST /v1/images/edits`: the image's transparent pixels, or the mask's, are inpainted."""

    image: UploadFile
    prompt: Prompt
    mask: UploadFile | None = None


class Variation(_ImageRequest):
    """`POST /v1/images/variations`."""

    image: UploadFile


class ImageData(BaseModel):
    url: str | None = None
    b64_json: str | None = None


class ImagesResponse(BaseModel):
    """The answer of all three; `created` is in seconds since 1970."""

    created: int
    data: list[ImageData]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "unclip"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class APIError(HTTPException):
    """An error response in OpenAI's format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Headers = None):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def error_answer(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Headers = None
) -> JSONResponse:
    body = {"message": message, "type": TYPES.get(status, "invalid_request_error"), "param": param, "code": code}
    return JSONResponse({"error": body}, status, headers)


def on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    found = getattr(error, "param", None), getattr(error, "code", None)
    return error_answer(error.status_code, str(error.detail), *found, headers=error.headers)


def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """400, never 422: the first thing that is wrong, with its value."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = where[0] if where else None
    kind = first["type"]
    if kind == "json_invalid":
        return error_answer(400, "the request's body is not valid JSON")
    if any(e["loc"][-1] == "image[]" for e in error.errors()):
        return error_answer(400, "Invalid 'image': give one image, not a list of them.", "image", "invalid_value")
    if param is None:
        return error_answer(400, f"the request's body is not what this endpoint takes: {first['msg']}")
    if kind == "missing":
        return error_answer(400, f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        return error_answer(400, f"Unknown parameter: '{param[:100]}'.", param[:100], "unknown_parameter")
    given = "" if isinstance(first.get("input"), dict | UploadFile) else f", got {_short(first.get('input'))}"
    return error_answer(400, f"Invalid '{param}': {first['msg']}{given}.", param, "invalid_value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"
