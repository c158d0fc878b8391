"""The routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from .drawing import Drawing
from .events import EventStream, cancel, gone
from .guard import Guard
from .problems import INTERNAL, INVALID, Problem, invalid, json_response
from .replies import images, model
from .schemas import GenerationRequest
from .service import Service

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}


def create_app(service: Service) -> ASGIApp:
    """The whole application, guard included."""
    app = FastAPI(title="offcut", docs_url=None, redoc_url=None, redirect_slashes=False)
    _health(app, service)
    _models(app, service)
    _page(app)
    _errors(app, service)

    @app.post("/v1/images/generations", response_model=None)
    async def generate(body: GenerationRequest, request: Request) -> Response:
        """Images for a prompt, as OpenAI's API has it."""
        if body.model not in (None, service.served.name):
            problem = _unknown_model(service)
            service.refused(problem)
            return problem.response()
        try:
            drawing = service.draw(body)
        except Exception as error:
            return service.problem(error).response()
        if body.stream:
            return EventStream(drawing, service.problem)
        return await _whole(drawing, service, request)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return Guard(app, service.settings, service.refused)


async def _whole(drawing: Drawing, service: Service, request: Request) -> Response:
    """All images at once; a client that goes away before they are done gives its place up."""
    with drawing:
        working = asyncio.ensure_future(drawing.result())
        leaving = asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                return Response(status_code=499)  # nobody reads it
            drawn = working.result()
        except Exception as error:
            return service.problem(error).response()
        finally:
            await cancel(working, leaving)
        return json_response(images(drawing.asked, drawn))


def _health(app: FastAPI, service: Service) -> None:
    """The two questions of KServe's Open Inference Protocol."""

    @app.get("/v2/health/live", response_model=None)
    async def live() -> Response:
        """Whether the engines work; if not, the process is about to end."""
        works = service.fault is None
        return json_response({"live": works}, 200 if works else 503)

    @app.get("/v2/health/ready", response_model=None)
    async def ready() -> Response:
        """Whether requests are taken."""
        return json_response({"ready": service.ready}, 200 if service.ready else 503)


def _models(app: FastAPI, service: Service) -> None:
    def found() -> dict[str, Any]:
        return model(service.served, service.settings, service.started)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """The one model that is served."""
        return json_response({"object": "list", "data": [found()]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def one(name: str) -> Response:
        """The same by its name."""
        if name != service.served.name:
            return _unknown_model(service).response()
        return json_response(found())


def _page(app: FastAPI) -> None:
    folder = files(__package__) / "page"
    for path, (name, kind) in _PAGE.items():
        answer = _file((folder / name).read_bytes(), kind)
        app.add_api_route(path, answer, methods=["GET"], response_model=None, include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


def _errors(app: FastAPI, service: Service) -> None:
    """Whatever goes wrong, the reply is JSON in OpenAI's form."""

    async def body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _told(invalid(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _told(_http_problem(error.status_code))

    async def bug(request: Request, error: Exception) -> Response:
        return _told(INTERNAL)  # uvicorn writes the traceback to the log

    def _told(problem: Problem) -> Response:
        service.refused(problem)
        return problem.response()

    app.add_exception_handler(RequestValidationError, body)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def _http_problem(status: int) -> Problem:
    if status == 404:
        return Problem(404, "there is nothing here: see /v1/models and /v1/images/generations", INVALID, "not_found")
    if status == 405:
        return Problem(405, "this takes another method", INVALID, "method_not_allowed")
    return Problem(400, "the body is no JSON that can be read", INVALID, "invalid_json")


def _unknown_model(service: Service) -> Problem:
    message = f"this server has one model, {service.served.name!r}: ask for that, or leave model out"
    return Problem(404, message, INVALID, "model_not_found", "model")
