"""A vLLM server as its documentation describes it, on loopback, that runs a tiny checkpoint.

Chat completions with return_token_ids and logprobs; adapters by name; weights by reload_weights,
with a version; pause, resume and health. Every request is answered by itself, from its seed alone.
Tests break one part of it.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mmalign.generate.local as local
from mmalign.attention.choose import choose
from mmalign.config import validate
from mmalign.generate.base import Request, Sampling, request_seed
from mmalign.generate.local import LocalGenerator
from mmalign.media import embed
from mmalign.models.load import ModelConfig, base_model, load_policy
from mmalign.records import Block, Media, Message, Verifiable, user
from mmalign.rewards import RewardsConfig, Rollout, Scored
from mmalign.scoring.candidates import Candidate, CandidateBatch
from mmalign.scoring.planner import planner_of
from mmalign.scoring.scorer import Scorer
from mmalign.store import write_dataset
from trainers.config import Recipe
from trainers.loop import Stepped, train


class FakeVllm(ThreadingHTTPServer):
    """base: the checkpoint that it starts with, served as "base"."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, base: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.base = str(base)
        self.policies: dict[str, Any] = {"base": self._load(self.base)}
        self.version, self.paused = "default", False
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        # Tests change what is answered, or wait in here.
        self.answering: Callable[[int, dict[str, Any]], dict[str, Any] | None] = lambda n, r: r
        self.healthy = True
        self.stale = False  # says that it loads weights, and does not

    def __enter__(self) -> FakeVllm:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of some tests."""

    def _load(self, path: str) -> Any:
        policy = load_policy(ModelConfig(path=path), merge=False)
        policy.model.eval()
        return policy

    def _reload(self, weights: str) -> Any:
        """The base's folder, tokenizer and all, with the weights of another."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(self.base, folder, dirs_exist_ok=True)
            shutil.copy(f"{weights}/model.safetensors", folder)
            return self._load(folder)

    def control(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer of what is not a completion."""
        self.calls[path] += 1
        if path == "/health":
            return (200 if self.healthy else 503), {}
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in self.policies]}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/v1/load_lora_adapter":
            name = body["lora_name"]
            if name in self.policies:
                return 400, {"error": {"message": f"{name} has already been loaded"}}
            if not (Path(body["lora_path"]) / "adapter_config.json").exists():
                return 404, {"error": {"message": f"no adapter found at {body['lora_path']}"}}
            last = self.policies[list(self.policies)[-1]]
            self.policies[name] = last if self.stale else self._load(body["lora_path"])
            return 200, "ok"
        if path == "/v1/unload_lora_adapter":
            return (200, "ok") if self.policies.pop(body["lora_name"], None) else (404, "no such")
        if path == "/pause":
            self.paused = True
        elif path == "/resume":
            self.paused = False
        elif path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            assert self.paused
            if not self.stale:
                self.policies["base"] = self._reload(body["kwargs"]["weights_path"])
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        else:
            return 404, "not found"
        return 200, {}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """A chat completion."""
        with self.lock:
            self.asked.append(body)
            number = len(self.asked)
        policy = self.policies.get(body["model"])
        if policy is None:
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        prompt, images = _read(body["messages"])
        request = Request(id=str(body["seed"]), prompt=prompt, images=images)
        sampling = Sampling(
            max_new_tokens=body["max_completion_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
        )
        with self.lock:
            made = LocalGenerator(policy).generate([request], sampling)[0]
            condition = policy.preparer.condition(prompt, images, None, id="fake")
            logps = _logps(policy, condition, list(made.token_ids))
        reply = {
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    # As a reasoning parser would leave it: nobody may read rewards from this.
                    "message": {"role": "assistant", "content": "?"},
                    "finish_reason": "stop" if made.finished else "length",
                    "token_ids": list(made.token_ids),
                    "logprobs": {"content": [{"token": "", "logprob": p} for p in logps]},
                }
            ],
            "prompt_token_ids": list(condition.prompt_ids),
            "usage": {"prompt_tokens": 1, "completion_tokens": made.num_tokens},
        }
        return 200, self.answering(number, reply)


class _Handler(BaseHTTPRequestHandler):
    server: FakeVllm
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(json.loads(data) if data else {})

    def _answer(self, body: dict[str, Any]) -> None:
        path = urlsplit(self.path).path
        chat = path == "/v1/chat/completions"
        status, reply = self.server.complete(body) if chat else self.server.control(path, body)
        if reply is None:  # The connection breaks off.
            self.close_connection = True
            self.connection.close()
            return
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


def _read(messages: list[dict[str, Any]]) -> tuple[tuple[Message, ...], tuple[Media, ...]]:
    prompt, images = [], []
    for message in messages:
        blocks = []
        content = message["content"]
        plain: list[dict[str, Any]] = [{"type": "text", "text": content}]
        parts = plain if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text":
                blocks.append(Block(type="text", text=part["text"]))
            else:
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                images.append(embed(Image.open(io.BytesIO(data)).convert("RGB")))
                blocks.append(Block(type="image"))
        prompt.append(Message(role=message["role"], content=tuple(blocks)))
    return tuple(prompt), tuple(images)


def _logps(policy: Any, condition: Any, ids: list[int]) -> list[float]:
    """Of each sampled token, before temperature."""
    config = base_model(policy.model).config.get_text_config()
    attention = choose("auto", policy.family, config, "cpu", torch.float32)
    batch = CandidateBatch(
        conditions=[condition], candidates=[Candidate(condition=0, response_ids=ids)]
    )
    plan = planner_of(policy, "padded", attention)(batch)
    with torch.no_grad():
        return Scorer(policy.model, policy.family, attention)(plan).logps[0, : len(ids)].tolist()


def by_letters(rollout: Rollout) -> float:
    """A worth that differs between random texts."""
    return float(sum(map(ord, rollout.text)) % 7)


class FakeRewards:
    """Rollouts are worth what their letters say."""

    def score(self, items: Sequence[Rollout]) -> list[Scored]:
        values = [by_letters(item) for item in items]
        return [Scored(total=v, parts={"accuracy": v}, reasons={}) for v in values]

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random texts differ in worth; local sampling draws from the seeds that a server is sent."""

    def seed_of(seed: int, id: str) -> int:
        return int(id) if id.isdigit() else request_seed(seed, id) & 2**31 - 1

    monkeypatch.setattr(local, "request_seed", seed_of)
    monkeypatch.setattr(RewardsConfig, "load", lambda self: FakeRewards())
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@dataclass(frozen=True)
class Fakes:
    """The fake's class, for a checkpoint of a test's own, and what `alike` put aside."""

    kind: type[FakeVllm] = FakeVllm
    real_rewards: Any = RewardsConfig.load


@pytest.fixture
def fake_vllm() -> Fakes:
    return Fakes()


@pytest.fixture
def server(tiny_model: Path) -> Iterator[FakeVllm]:
    with FakeVllm(tiny_model) as running:
        yield running


def question(number: int) -> Verifiable:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Verifiable(
        id=f"row-{number}",
        prompt=user(f"What is it? {number}", images=1),
        images=(embed(Image.fromarray(pixels)),),
        answer=str(number),
        verifier="number",
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "prompts", Verifiable, [question(n) for n in range(6)])
    return tmp_path / "prompts"


@pytest.fixture
def recipe(tiny_model: Path, prompts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of three steps; sections are merged; a server's settings are `generator`."""

    def make(name: str = "run", generator: Any = None, lora: Any = None, **more: Any) -> Recipe:
        rollouts = {"group_size": 3, "decoding": {"max_new_tokens": 5}} | more.pop("rollouts", {})
        if generator is not None:
            quick = {"backoff_seconds": 0.01, "timeout_seconds": 20.0, "max_retries": 1}
            quick |= {"engine": "vllm", "model": "base", "max_gap": 1e-3}
            rollouts["generator"] = quick | generator
        optim = {"lr": 1e-2, "batch_size": 2, "steps": 3, "schedule": "constant"}
        run = {"output": str(tmp_path / name), "log_every_steps": 1}
        values = {
            "model": {"path": str(tiny_model), "lora": lora} | more.pop("model", {}),
            "data": {"path": str(prompts)},
            "loss": {"name": "grpo"},
            "rollouts": rollouts,
            "optim": optim | more.pop("optim", {}),
            "run": run | more.pop("run", {}),
        }
        return validate(values | more, Recipe, "test")

    return make


@pytest.fixture
def trained() -> Callable[[Recipe], tuple[list[dict[str, float]], dict[str, torch.Tensor]]]:
    """Trains; returns the log lines and the final weights."""

    def run(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        metrics = [event.metrics for event in train(recipe) if isinstance(event, Stepped)]
        (file,) = (recipe.run.output / "model").glob("*model.safetensors")
        return metrics, load_file(file)

    return run
