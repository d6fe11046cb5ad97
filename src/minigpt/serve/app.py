"""The routes. Each does no more than read, ask the service, and render."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from minigpt.api.admin import LoadAdapterBody, SwapBody, UnloadAdapterBody
from minigpt.api.body import Body, parse_body
from minigpt.api.embeddings import EmbeddingBody
from minigpt.api.openai import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from minigpt.api.openai_responses import ModelList, encode
from minigpt.core.errors import RequestError
from minigpt.serve.admin import Admin
from minigpt.serve.config import ServeConfig
from minigpt.serve.http import (
    GenerationResponse,
    JsonResponse,
    RequestMiddleware,
    check_loopback,
    error_response,
    read_body,
)
from minigpt.serve.metrics import ServeMetrics
from minigpt.serve.render import ChatRenderer, CompletionRenderer
from minigpt.serve.render_embeddings import EmbeddingRenderer
from minigpt.serve.service import Service
from minigpt.serve.supervisor import Supervisor


def create_app(
    config: ServeConfig,
    service: Service,
    supervisor: Supervisor,
    metrics: ServeMetrics,
    admin: Admin,
) -> FastAPI:
    """Build the ASGI application over a service that is already running."""
    app = FastAPI(title="minigpt", version=version("minigpt"), docs_url=None, redoc_url=None)
    app.add_middleware(RequestMiddleware, metrics=metrics)
    _add_errors(app, supervisor)
    _add_generation(app, config, service)
    _add_models(app, service)
    _add_tokens(app, config, service)
    _add_operation(app, service, supervisor, metrics)
    _add_admin(app, config, admin)
    return app


def _add_errors(app: FastAPI, supervisor: Supervisor) -> None:
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return error_response(error, supervisor.retry_after_seconds())

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(RequestError(message, status=error.status_code, code=code))

    app.add_exception_handler(RequestError, refuse)
    app.add_exception_handler(HTTPException, no_route)


def _add_generation(app: FastAPI, config: ServeConfig, service: Service) -> None:
    @app.post("/v1/completions", openapi_extra=_body_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continue prompts."""
        body = parse_body(CompletionBody, await read_body(request, config.max_body_bytes))
        job = await service.complete(body)
        return GenerationResponse(
            job,
            CompletionRenderer(job, service.tokenizer, include_usage=body.include_usage),
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )

    @app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatCompletionBody))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = parse_body(ChatCompletionBody, await read_body(request, config.max_body_bytes))
        job = await service.chat(body)
        return GenerationResponse(
            job,
            ChatRenderer(job, service.tokenizer, include_usage=body.include_usage),
            stream=bool(body.stream),
            include_usage=body.include_usage,
        )

    @app.post("/v1/embeddings", openapi_extra=_body_schema(EmbeddingBody))
    async def embeddings(request: Request) -> Response:
        """Turn texts into vectors."""
        body = parse_body(EmbeddingBody, await read_body(request, config.max_body_bytes))
        job = await service.embed(body)
        renderer = EmbeddingRenderer(
            job, base64=body.encoding_format == "base64", normalize=body.normalize is not False
        )
        return GenerationResponse(job, renderer, stream=False, include_usage=False)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """List the served model and its adapters."""
        return JsonResponse(encode(ModelList(service.models())))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Describe the served model or an adapter."""
        service.check_model(name)
        (found,) = (each for each in service.models() if each.id == name)
        return JsonResponse(encode(found))


def _add_tokens(app: FastAPI, config: ServeConfig, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=_body_schema(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """Turn text into token ids, as `/v1/completions` would."""
        body = parse_body(TokenizeBody, await read_body(request, config.max_body_bytes))
        tokens = await service.tokenize(body)
        return JsonResponse(encode({"tokens": tokens, "count": len(tokens)}))

    @app.post("/detokenize", openapi_extra=_body_schema(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        """Turn token ids into text."""
        body = parse_body(DetokenizeBody, await read_body(request, config.max_body_bytes))
        return JsonResponse(encode({"prompt": service.detokenize(body)}))


def _add_operation(
    app: FastAPI, service: Service, supervisor: Supervisor, metrics: ServeMetrics
) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Tell whether the server is alive: starting counts, a dead or stalled engine does not."""
        status = supervisor.status()
        alive = status in ("starting", "ready")
        return JsonResponse(encode({"status": status}), status_code=200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Tell whether a request would be taken now."""
        status = "draining" if service.draining else supervisor.status()
        return JsonResponse(
            encode({"status": status}), status_code=200 if status == "ready" else 503
        )

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Return all series in Prometheus' text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def server_version() -> Response:
        """Return minigpt's version."""
        return JsonResponse(encode({"version": version("minigpt")}))


def _add_admin(app: FastAPI, config: ServeConfig, admin: Admin) -> None:
    @app.post("/admin/swap", openapi_extra=_body_schema(SwapBody))
    async def swap(request: Request) -> Response:
        """Serve other weights; answers that run finish on the old ones."""
        check_loopback(request)
        body = parse_body(SwapBody, await read_body(request, config.max_body_bytes))
        ready = await admin.swap(body.model)
        return JsonResponse(encode({"model": body.model, "root": ready.model_id}))

    @app.post("/v1/load_lora_adapter", openapi_extra=_body_schema(LoadAdapterBody))
    async def load_adapter(request: Request) -> Response:
        """Let requests name an adapter as their model."""
        check_loopback(request)
        body = parse_body(LoadAdapterBody, await read_body(request, config.max_body_bytes))
        await admin.load_adapter(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' is loaded.")

    @app.post("/v1/unload_lora_adapter", openapi_extra=_body_schema(UnloadAdapterBody))
    async def unload_adapter(request: Request) -> Response:
        """Drop an adapter; answers that run with it finish."""
        check_loopback(request)
        body = parse_body(UnloadAdapterBody, await read_body(request, config.max_body_bytes))
        await admin.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' is dropped.")


def _body_schema(cls: type[Body]) -> dict[str, Any]:
    schema = cls.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
