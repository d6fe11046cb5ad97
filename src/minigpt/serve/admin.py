"""What an operator may do to a running server: swap weights, load and drop adapters.

The supervisor is told as well, so that an engine process that is started anew serves the same.
"""

from __future__ import annotations

import uuid

from minigpt.api.requests import Ready
from minigpt.core.errors import RequestError
from minigpt.core.telemetry import get_logger
from minigpt.serve.engine_client import EngineClient
from minigpt.serve.supervisor import Supervisor
from minigpt.serve.wire import LoadAdapter, SwapWeights, UnloadAdapter


class Admin:
    """Changes what is served.

    Args:
        client: The engine.
        supervisor: Who starts it.
        model_name: What clients call the model, which no adapter may be called.
    """

    def __init__(self, client: EngineClient, supervisor: Supervisor, model_name: str) -> None:
        self._client = client
        self._supervisor = supervisor
        self._model_name = model_name
        self._log = get_logger("admin")

    async def swap(self, path: str) -> Ready:
        """Serve other weights; answers that run finish on the old ones.

        Raises:
            RequestError: As `Engine.swap` refuses, with status 400; or 503 without an engine.
        """
        ready = await self._client.control(SwapWeights(id=uuid.uuid4().hex, path=path))
        self._supervisor.model_path = path
        self._supervisor.adapters = {}
        self._log.info("weights swapped", model=path, weights=ready.model_id)
        return ready

    async def load_adapter(self, name: str, path: str) -> None:
        """Let requests name an adapter as their model.

        Raises:
            RequestError: The name is taken, or the engine refuses; or 503 without an engine.
        """
        if name == self._model_name:
            raise RequestError(f"lora_name = {name!r} is the served model's", param="lora_name")
        message = LoadAdapter(id=uuid.uuid4().hex, name=name, path=path)
        ready = await self._client.control(message)
        self._supervisor.adapters[name] = path
        self._log.info("adapter loaded", adapter=name, path=path, digest=ready.adapters[name])

    async def unload_adapter(self, name: str) -> None:
        """Drop an adapter; answers that run with it finish.

        Raises:
            RequestError: Status 404, no such adapter; or 503 without an engine.
        """
        await self._client.control(UnloadAdapter(id=uuid.uuid4().hex, name=name))
        self._supervisor.adapters.pop(name, None)
        self._log.info("adapter unloaded", adapter=name)
