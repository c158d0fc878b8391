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

from .events import EventStream, cancel, gone
from .going import Going
from .guard import Guard
from .offer import Offer
from .problems import INTERNAL, INVALID, Problem, invalid, json_response
from .replies import images, model
from .schemas import GenerationRequest

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}


def create_app(offer: Offer) -> ASGIApp:
    """The whole application, guard included."""
    app = FastAPI(title="offcut", docs_url=None, redoc_url=None, redirect_slashes=False)
    _health(app, offer)
    _models(app, offer)
    _page(app)
    _errors(app, offer)

    @app.post("/v1/images/generations", response_model=None)
    async def generate(body: GenerationRequest, request: Request) -> Response:
        """Images for a prompt, as OpenAI's API has it."""
        if body.model is not None and body.model not in offer.models:
            problem = _unknown_model(offer)
            offer.refused(problem)
            return problem.response()
        try:
            drawing = offer.draw(body)
        except Exception as error:
            return offer.problem(error).response()
        if body.stream:
            return EventStream(drawing, offer.problem)
        return await _whole(drawing, offer, request)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await offer.measured(), media_type=CONTENT_TYPE_LATEST)

    return Guard(app, offer.settings, offer.refused)


async def _whole(drawing: Going, offer: Offer, request: Request) -> Response:
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
            return offer.problem(error).response()
        finally:
            await cancel(working, leaving)
        return json_response(images(drawing.asked, drawn))


def _health(app: FastAPI, offer: Offer) -> None:
    """The two questions of KServe's Open Inference Protocol."""

    @app.get("/v2/health/live", response_model=None)
    async def live() -> Response:
        """Whether the engines work; if not, the process is about to end."""
        works = offer.fault is None
        return json_response({"live": works}, 200 if works else 503)

    @app.get("/v2/health/ready", response_model=None)
    async def ready() -> Response:
        """Whether requests are taken."""
        return json_response({"ready": offer.ready}, 200 if offer.ready else 503)


def _models(app: FastAPI, offer: Offer) -> None:
    def found(name: str) -> dict[str, Any]:
        return model(offer.models[name], offer.settings, offer.started)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """All that are served, first the one for requests that name none."""
        return json_response({"object": "list", "data": [found(name) for name in offer.models]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def one(name: str) -> Response:
        """One of them by its name."""
        if name not in offer.models:
            return _unknown_model(offer).response()
        return json_response(found(name))


def _page(app: FastAPI) -> None:
    folder = files(__package__) / "page"
    for path, (name, kind) in _PAGE.items():
        answer = _file((folder / name).read_bytes(), kind)
        app.add_api_route(path, answer, methods=["GET"], response_model=None, include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


def _errors(app: FastAPI, offer: Offer) -> None:
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
        offer.refused(problem)
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


def _unknown_model(offer: Offer) -> Problem:
    names = [repr(name) for name in offer.models]
    there = f"one model, {names[0]}: ask for that" if len(names) == 1 else f"{', '.join(names)}: ask for one of these"
    return Problem(404, f"this server has {there}, or leave model out", INVALID, "model_not_found", "model")
