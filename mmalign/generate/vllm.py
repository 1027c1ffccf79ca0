"""The control side of a vLLM server: is it ready, which weights does it serve, load others.

    adapters   /v1/load_lora_adapter, /v1/unload_lora_adapter, /v1/models; the server needs
               --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
    weights    /pause, /collective_rpc (reload_weights), /update_weight_version, /weight_info,
               /resume; the server needs VLLM_SERVER_DEV_MODE=1

as vLLM's documentation describes them (LoRA adapters; layerwise reloading; weight transfer; async
reinforcement learning). Requests for text go through `server.py`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmalign.errors import MissingExtra, ModelError
from mmalign.generate.client import is_this_machine, read_key

# Between two looks at a server that is starting.
LOOK_SECONDS = 0.2


class VllmControl:
    """One server's control endpoints. Raises ModelError where it refuses or does not answer.

    timeout_seconds: for one call; loading weights is one.
    """

    def __init__(self, base_url: str, *, api_key_env: str, timeout_seconds: float) -> None:
        try:
            import httpx
        except ImportError:
            raise MissingExtra(
                "a server needs the package openai", fix="pip install 'mmalign[server]'"
            ) from None
        # The endpoints of the openai interface are under /v1, those of vLLM beside it.
        self.root = base_url.rstrip("/").removesuffix("/v1")
        self.base_url = base_url
        local = is_this_machine(base_url)
        self._key = key = read_key(api_key_env, base_url, needed=not local)
        self._client = httpx.Client(
            timeout=timeout_seconds,
            trust_env=not local,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    def wait(self, seconds: float) -> None:
        """Return as soon as the server is ready. Raises ModelError where it is not by then."""
        import httpx

        last, end = "nothing yet", time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                reply = self._client.get(f"{self.root}/health", timeout=min(10.0, seconds))
                if reply.status_code == 200:
                    return
                last = f"status {reply.status_code}"
            except httpx.HTTPError as error:
                last = str(error) or type(error).__name__
            time.sleep(min(LOOK_SECONDS, seconds))
        raise ModelError(
            f"it was not ready within {seconds:g} seconds",
            where=self.root,
            got=last,
            fix="start it, or give it longer with ready_seconds",
        )

    def models(self) -> set[str]:
        """The names that a request may give as its model: the base and the loaded adapters."""
        told = self._call("GET", "/v1/models").json()
        return {one["id"] for one in told["data"]}

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve the adapter in a folder that the server sees under the same path."""
        needs = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        body = {"lora_name": name, "lora_path": str(folder)}
        self._call("POST", "/v1/load_lora_adapter", body, fix=needs)

    def unload_adapter(self, name: str) -> None:
        """Serve an adapter no longer."""
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def load_weights(self, version: str, folder: Path) -> None:
        """Serve the checkpoint in a folder that the server sees under the same path.

        Requests on their way are let finish, and what was cached of the old weights is dropped
        (/pause does). Where loading fails the server stays paused, so that nothing answers from
        weights that are half replaced.
        """
        needs = "start it with VLLM_SERVER_DEV_MODE=1"
        self._call("POST", "/pause?mode=wait", fix=needs)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._call("POST", "/collective_rpc", body)
        self._call("POST", "/update_weight_version", {"new_version": version}, fix=_TOO_OLD)
        self._call("POST", "/resume")

    def weight_version(self) -> str:
        """What `load_weights` called the weights that are served; "default" before."""
        return str(self._call("GET", "/weight_info", fix=_TOO_OLD).json()["weight_version"])

    def _call(self, method: str, path: str, body: Any = None, *, fix: str | None = None) -> Any:
        import httpx

        try:
            reply = self._client.request(method, f"{self.root}{path}", json=body)
        except httpx.HTTPError as error:
            raise ModelError(
                f"{path} does not answer ({str(error) or type(error).__name__})",
                where=self.root,
                fix="see whether it runs",
            ) from None
        if reply.status_code != 200:
            told = reply.text.replace(self._key, "…") if self._key else reply.text
            raise ModelError(
                f"{path} is refused (status {reply.status_code})",
                where=self.root,
                got=" ".join(told.split())[:300] or None,
                fix=fix,
            )
        return reply


_TOO_OLD = (
    "use a vLLM that knows /weight_info and start it with VLLM_SERVER_DEV_MODE=1; or train a LoRA, "
    "whose versions are told apart by name"
)
