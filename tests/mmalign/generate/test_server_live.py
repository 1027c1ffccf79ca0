"""A real server on loopback, `transformers serve`, with checkpoints that are made here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_builders.base import OverlapFilter
from data_builders.on_policy import OnPolicy
from mmalign.errors import ModelError
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.generate.local import LocalGenerator
from mmalign.generate.server import ServerConfig
from mmalign.judge import Case, Judge
from mmalign.media import embed
from mmalign.models.tiny import TinyModel
from mmalign.records import Example, Media, Preference, user
from mmalign.store import open_dataset, write_dataset

FAMILIES = ("llava15", "qwen25vl")
SAFETENSORS = "model.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a server that loads whatever checkpoint a request names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "log.txt"
    command = [Path(sys.executable).with_name("transformers"), "serve", "--device", "cpu"]
    with open(log, "w") as sink:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 120
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def healthy(port: int) -> bool:
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with no_proxy.open(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory, server) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    TinyModel(output=str(folder), family=request.param).build()
    speak_letters(folder)
    return folder


def speak_letters(folder: Path) -> None:
    """No special tokens, which engines ban or show differently; "z" becomes an end of the turn."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer, weights = AutoTokenizer.from_pretrained(folder), load_file(folder / SAFETENSORS)
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    head = next(tensor for name, tensor in weights.items() if name.endswith("lm_head.weight"))
    head[[n for n in range(len(head)) if n not in letters]] = 0.0
    head[tokenizer.eos_token_id] = 1.5 * head[letters[-1]]
    save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    texts = ["what is near", "the image shows", "what is the image", "two dog and cat"]
    numbers = [1, 1, 2, 0]
    return [
        Request(
            id=f"r{n}",
            prompt=user(text, images=count),
            images=tuple(picture(10 * n + k) for k in range(count)),
        )
        for n, (text, count) in enumerate(zip(texts, numbers, strict=True))
    ]


def picture(seed: int) -> Media:
    pixels = np.random.RandomState(seed).randint(0, 255, (32, 32, 3), dtype=np.uint8)
    return embed(Image.fromarray(pixels))


def config(server: str, path: Path, **settings) -> ServerConfig:
    return ServerConfig(**{"model": str(path), "base_url": server, "max_retries": 1, **settings})


def test_greedy_text_is_the_local_engines(server, path, requests):
    """Same checkpoint, same prompts and pictures, another way through: word for word the same."""
    sampling = Sampling(max_new_tokens=9)
    local = LocalGenerator.from_checkpoint(str(path), batch_size=1, device="cpu")
    wanted = local.generate(requests, sampling)
    made = config(server, path).load().generate(requests, sampling)
    assert [(g.id, g.text, g.finished) for g in made] == [
        (g.id, g.text, g.finished) for g in wanted
    ]
    assert {g.finished for g in made} == {True, False}
    assert len({g.text for g in made}) == len(made)


def test_a_seed_decides_a_sample(server, path, requests, tmp_path):
    """The server draws only where the checkpoint says so, and from one state: one at a time."""
    copy = tmp_path / "samples"
    shutil.copytree(path, copy)
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": True}))
    generator = config(server, copy, concurrency=1).load()

    def say(seed: int) -> list[Generation]:
        sampling = Sampling(max_new_tokens=9, temperature=1.0, seed=seed)
        return generator.generate(requests, sampling)

    assert say(0) == say(0)
    assert say(0) != say(1)


def test_what_the_server_refuses_is_told_in_its_words(server, path, requests):
    with pytest.raises(ModelError, match=r"request r0 \(status 422\).*Unexpected fields.*nonsense"):
        config(server, path, extra={"nonsense": 1}).load().generate(requests[:1], Sampling())


def test_a_builder_asks_the_server_once_and_its_ledger_after(server, path, tmp_path):
    rows = [
        Example(
            id=f"e{n}", prompt=user("the image shows", images=1), images=(picture(n),),
            answer="one red dog",
        )
        for n in range(3)
    ]  # fmt: skip
    write_dataset(tmp_path / "in", Example, rows)
    settings = {
        "source": tmp_path / "in",
        "generator": config(server, path, temperature=0.0, ledger=tmp_path / "answers.jsonl"),
        "similarity": OverlapFilter(),
        "tries": 2,
    }
    OnPolicy(**settings, output=tmp_path / "first").build()
    first = open_dataset(tmp_path / "first", Preference)
    assert first.manifest.model["generator"] == f"server:{path}"
    assert server not in (tmp_path / "first/manifest.json").read_text()
    asked = (tmp_path / "answers.jsonl").read_text()
    assert 3 <= asked.count("\n") <= 6
    dead = settings["generator"].model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    OnPolicy(**(settings | {"generator": dead}), output=tmp_path / "again").build()
    assert list(open_dataset(tmp_path / "again", Preference)) == list(first)
    assert (tmp_path / "answers.jsonl").read_text() == asked


def test_a_judge_that_talks_nonsense_decides_nothing(server, path):
    judge = Judge(config(server, path).load(), tries=2, sampling=Sampling(max_new_tokens=5))
    cases = [Case(id=name, question="what", answer="a dog", response="a cat") for name in "ab"]
    for ruling in judge.is_correct(cases):
        assert (ruling.value, ruling.num_tries) == (None, 2)
        assert ruling.reason in ("cut", "no_verdict")
