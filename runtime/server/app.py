"""Routes: image generation, models, health, metrics and the page."""

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

from .events import EventStream, cancel, images_body, wait_for_disconnect
from .http import INTERNAL, INVALID, Problem, RequestGuard, invalid_body, json_response, size_text
from .jobs import ImageJob
from .models import ModelInfo
from .schemas import GenerationRequest
from .service import ImageService
from .settings import ServeSettings

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}


def create_app(service: ImageService) -> ASGIApp:
    """Return the ASGI application of a service, guarded by ``RequestGuard``."""
    app = FastAPI(title="offcut", docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_health(app, service)
    _add_models(app, service)
    _add_page(app)
    _add_error_handlers(app, service)

    @app.post("/v1/images/generations", response_model=None)
    async def generate(body: GenerationRequest, request: Request) -> Response:
        """Generate images for a prompt, as in OpenAI's API."""
        if body.model is not None and body.model not in service.models:
            problem = _unknown_model(service)
            service.count_problem(problem)
            return problem.response()
        try:
            job = service.submit(body)
        except Exception as error:
            return service.problem(error).response()
        if body.stream:
            return EventStream(job, service.problem)
        return await _images_reply(job, service, request)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return RequestGuard(app, service.settings, service.count_problem)


async def _images_reply(job: ImageJob, service: ImageService, request: Request) -> Response:
    """Wait for the images and return them together; a client that disconnects first cancels the job."""
    with job:
        result = asyncio.ensure_future(job.result())
        disconnect = asyncio.ensure_future(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait({result, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                return Response(status_code=499)  # the client has disconnected
            images = result.result()
        except Exception as error:
            return service.problem(error).response()
        finally:
            await cancel(result, disconnect)
        return json_response(images_body(job.params, images))


def _add_health(app: FastAPI, service: ImageService) -> None:
    """Add the health checks of KServe's Open Inference Protocol."""

    @app.get("/v2/health/live", response_model=None)
    async def live() -> Response:
        """Return whether the engines work. If they do not, the process ends soon."""
        works = service.fault is None
        return json_response({"live": works}, 200 if works else 503)

    @app.get("/v2/health/ready", response_model=None)
    async def ready() -> Response:
        """Return whether requests are accepted."""
        return json_response({"ready": service.ready}, 200 if service.ready else 503)


def _add_models(app: FastAPI, service: ImageService) -> None:
    def model_body(name: str) -> dict[str, Any]:
        return _model_body(service.models[name], service.settings, service.started)

    @app.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        """Return all served models, the default first."""
        return json_response({"object": "list", "data": [model_body(name) for name in service.models]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def get_model(name: str) -> Response:
        """Return one model."""
        if name not in service.models:
            return _unknown_model(service).response()
        return json_response(model_body(name))


def _model_body(model: ModelInfo, settings: ServeSettings, created: int) -> dict[str, Any]:
    """Return OpenAI's ``Model``; its field ``offcut`` has sizes, defaults and limits."""
    limits = settings.limits
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "offcut",
        "offcut": {
            "size": size_text(model.size),
            "multiple": model.multiple,
            "cuts": list(model.cuts),
            "tuned": list(model.schedules),
            "previews": model.previews,
            "defaults": {
                "num_inference_steps": settings.steps,
                "guidance_scale": settings.guidance,
                "interval": settings.interval,
                "warmup": settings.warmup,
                "schedule": settings.schedule,
                "forecast": settings.forecast,
                "timeout": settings.timeout,
            },
            "limits": {
                "prompt_chars": limits.prompt_chars,
                "num_inference_steps": limits.steps,
                "n": limits.images,
                "pixels": limits.pixels_of(model.size),
                "pixel_steps": limits.pixel_steps,
                "body_bytes": limits.body_bytes,
            },
        },
    }


def _add_page(app: FastAPI) -> None:
    folder = files(__package__) / "page"
    for path, (name, content_type) in _PAGE.items():
        route = _file_route((folder / name).read_bytes(), content_type)
        app.add_api_route(path, route, methods=["GET"], response_model=None, include_in_schema=False)


def _file_route(content: bytes, content_type: str) -> Callable[[], Awaitable[Response]]:
    async def route() -> Response:
        return Response(content, media_type=content_type)

    return route


def _add_error_handlers(app: FastAPI, service: ImageService) -> None:
    """Make every error reply JSON in OpenAI's form."""

    async def on_invalid_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return reply(invalid_body(error.errors()))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return reply(_http_problem(error.status_code))

    async def on_bug(request: Request, error: Exception) -> Response:
        return reply(INTERNAL)  # uvicorn writes the traceback to the log

    def reply(problem: Problem) -> Response:
        service.count_problem(problem)
        return problem.response()

    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def _http_problem(status: int) -> Problem:
    if status == 404:
        return Problem(404, "this path does not exist: see /v1/models and /v1/images/generations", INVALID, "not_found")
    if status == 405:
        return Problem(405, "this path does not support this method", INVALID, "method_not_allowed")
    return Problem(400, "the body is not valid JSON", INVALID, "invalid_json")


def _unknown_model(service: ImageService) -> Problem:
    names = [repr(name) for name in service.models]
    models = f"one model, {names[0]}" if len(names) == 1 else f"the models {', '.join(names)}"
    message = f"there is no such model: this server has {models}; name one, or leave model out"
    return Problem(404, message, INVALID, "model_not_found", "model")
