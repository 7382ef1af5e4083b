"""Answers that say what is wrong and what to do, as problem JSON (RFC 9457).

Knows nothing of the routes that give them.
"""

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from engine.errors import ClipmillError

MEDIA_TYPE = "application/problem+json"
_MAX_FAULTS = 5
_logger = logging.getLogger("clipmill.serve")


class ProblemBody(BaseModel):
    """What is wrong, and what to do (RFC 9457)."""

    type: str = Field(
        default="about:blank", description="Always about:blank: the status says the kind."
    )
    title: str = Field(description="The status in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong with this request, and what to do.")


class Problem(Exception):  # noqa: N818 - an answer, not a failure
    """An answer of 4xx or 5xx."""

    def __init__(
        self, status: int, detail: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Say what is wrong with this request, and what to do."""
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The JSON."""
        return json.dumps(
            {
                "type": "about:blank",
                "title": HTTPStatus(self.status).phrase,
                "status": self.status,
                "detail": self.detail,
            }
        ).encode()

    def response(self) -> Response:
        """The answer."""
        return Response(
            self.body, status_code=self.status, media_type=MEDIA_TYPE, headers=self.headers
        )


def overloaded(detail: str) -> Problem:
    """503, and when to ask again."""
    return Problem(503, detail, headers={"Retry-After": "1"})


def add_problems(app: FastAPI) -> None:
    """Let every error of an app be answered as problem JSON."""

    @app.exception_handler(Problem)
    def _problem(request: Request, problem: Problem) -> Response:
        return problem.response()

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Response:
        # FastAPI's own, of a body that was refused while it was read.
        if isinstance(error.__cause__, Problem):
            return error.__cause__.response()
        return _of_http(request, error).response()

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: RequestValidationError) -> Response:
        return Problem(422, _faults(error)).response()

    @app.exception_handler(ClipmillError)
    def _environment(request: Request, error: ClipmillError) -> Response:
        _logger.error("%s %s: %s", request.method, request.url.path, error)
        return overloaded(str(error)).response()


def unexpected() -> Problem:
    """500: a bug."""
    return Problem(
        500, "the service failed on this request, which is a fault of its own; its log says how"
    )


def _of_http(request: Request, error: HTTPException) -> Problem:
    path = request.url.path
    details = {
        400: "the body cannot be read as JSON; /docs says what is expected",
        404: f"nothing is at {path}; /docs lists what there is",
        405: f"{path} does not take {request.method}; /docs lists what it takes",
    }
    detail = details.get(error.status_code, str(error.detail))
    return Problem(error.status_code, detail, headers=error.headers)


def _faults(error: RequestValidationError) -> str:
    """The first faults of a body or of parameters in one line."""
    faults = [_fault(fault) for fault in error.errors()]
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    return "; ".join(faults[:_MAX_FAULTS]) + more + ". /docs says what is expected"


def _fault(fault: Mapping[str, Any]) -> str:
    place = ".".join(str(part)[:80] for part in fault["loc"])
    if fault["type"] == "json_invalid":
        return f"body: not JSON ({fault['ctx']['error']})"
    return f"{place}: {fault['msg'].removeprefix('Value error, ')}"
