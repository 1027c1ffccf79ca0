"""One request to a chat server: what came back, or what went wrong and whether it may pass."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from mmalign.errors import MissingExtra, ModelError
from mmalign.generate.chat import read_answer
from mmalign.generate.ledger import Answer

_PASSING = frozenset({408, 409, 425, 429})


class Passing(Exception):
    """What may pass by itself: `reason` is counted, the message is read.

    `pause_seconds` is what the server asks us to wait.
    """

    def __init__(self, reason: str, detail: str, pause_seconds: float = 0.0) -> None:
        super().__init__(detail)
        self.reason, self.pause_seconds = reason, pause_seconds


class ChatClient:
    """The openai client without its own retries. The key is in it, and in nothing it says."""

    def __init__(self, base_url: str, *, api_key_env: str, timeout_seconds: float) -> None:
        try:
            import openai
        except ImportError:
            raise MissingExtra(
                "engine: server needs the package openai",
                fix="install it: pip install 'mmalign[server]'",
            ) from None
        self.base_url, self.api_key_env = base_url, api_key_env
        self.timeout_seconds = timeout_seconds
        local = is_this_machine(base_url)
        self._key = read_key(api_key_env, base_url, needed=not local)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=timeout_seconds,
            # A proxy of the environment leads away from this machine.
            http_client=openai.DefaultHttpxClient(trust_env=False) if local else None,
        )

    def ask(self, request_id: str, body: Mapping[str, Any]) -> Answer:
        """Ask once. Raises Passing, or ModelError where asking again would not help."""
        import openai

        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        try:
            reply = self._client.chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=rest
            )
        except openai.APITimeoutError:
            raise Passing("timeout", f"no reply in {self.timeout_seconds:g} s") from None
        except openai.APIConnectionError as error:
            detail = self._scrubbed(str(error.__cause__ or error))
            raise Passing("connection", f"no connection ({detail})") from None
        except openai.APIStatusError as error:
            raise self._status(error, request_id) from None
        try:
            return read_answer(reply.text)
        except ValueError as error:
            raise Passing("malformed", f"a reply with {self._scrubbed(str(error))}") from None

    def _status(self, error: Any, request_id: str) -> Passing | ModelError:
        status, told = error.status_code, self._told(error)
        # An empty account does not fill itself while we wait.
        if (status in _PASSING or status >= 500) and error.code != "insufficient_quota":
            pause = _asked_pause(error.response.headers)
            return Passing(f"status_{status}", f"status {status}: {told}", pause)
        fixes = {
            401: f"set {self.api_key_env} to a key that the server knows",
            403: f"check what the key in {self.api_key_env} may do",
            404: "check model and base_url, which mostly ends in /v1",
            429: "top up the account and start again",
        }
        return ModelError(
            f"the server refuses request {request_id} (status {status})",
            where=self.base_url,
            got=told,
            fix=fixes.get(status, "change what it names; `extra` adds and leaves out fields"),
        )

    def _told(self, error: Any) -> str:
        """The server's own words, without the key, should it repeat that."""
        body = error.body
        told = body.get("message") or body.get("detail") if isinstance(body, dict) else body
        return self._scrubbed(" ".join(str(told or error.message).split()))[:300]

    def _scrubbed(self, text: str) -> str:
        return text.replace(self._key, f"${self.api_key_env}") if self._key else text


def read_key(variable: str, base_url: str, *, needed: bool) -> str:
    """The key in an environment variable, "" where there need be none. Raises ModelError."""
    key = os.environ.get(variable, "").strip()
    if needed and not key:
        raise ModelError(
            f"the environment variable {variable} is not set",
            where=base_url,
            fix=f"export {variable}=…, or name another variable in api_key_env",
        )
    if not (key.isascii() and key.isprintable()):
        raise ModelError(
            f"the environment variable {variable} holds what cannot be sent as a key",
            where=base_url,
            wanted="ASCII characters in one line",
        )
    return key


def is_this_machine(url: str) -> bool:
    """Whether an address is this machine's own, where no proxy must be asked."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks for in retry-after-ms or Retry-After, 0 where it does not."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "0")
        if value.replace(".", "", 1).isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
