"""Nothing that was answered is asked again, whatever happened in between; budgets hold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmalign.errors import DataError, ModelError
from mmalign.generate.base import Request, Sampling
from mmalign.generate.budget import BudgetReached
from mmalign.generate.ledger import Ledger, Spent
from mmalign.media import embed
from mmalign.records import user

SAMPLING = Sampling(max_new_tokens=7, temperature=0.5, seed=3)


def asks(count: int) -> list[Request]:
    return [Request(id=f"r{n}", prompt=user(f"say {n}")) for n in range(count)]


def echo(body, number):
    return {"text": f"{body['messages'][-1]['content']}…\ud83d", "finish": "length"}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "kept" / "answers.jsonl"


def test_a_restart_asks_nothing_twice(scripted, path):
    scripted.script = echo
    first = scripted.config(ledger=path).load().generate(asks(4), SAMPLING)
    again = scripted.config(ledger=path).load().generate(asks(6), SAMPLING)
    assert again[:4] == first
    assert [g.text for g in again] == [f"say {n}…?" for n in range(6)]
    assert len(scripted.bodies) == 6
    assert {row["id"] for row in rows(path)} == {f"r{n}" for n in range(6)}


@pytest.mark.parametrize(
    "other",
    [
        {"sampling": replace(SAMPLING, seed=4)},
        {"sampling": replace(SAMPLING, temperature=0.6)},
        {"sampling": replace(SAMPLING, max_new_tokens=8)},
        {"config": {"model": "m2"}},
        {"config": {"extra": {"top_k": 1}}},
        {"request": {"prompt": user("say 1", images=1)}},
        {"request": {"images": (embed(Image.new("RGB", (4, 4), "blue")),)}},
        {"request": {"id": "r1"}},
    ],
    ids=["seed", "temperature", "limit", "model", "extra", "text", "picture", "id"],
)
def test_what_decides_the_answer_is_asked_anew(scripted, path, other):
    red = embed(Image.new("RGB", (4, 4), "red"))
    request = Request(id="r0", prompt=user("say 0", images=1), images=(red,))
    scripted.config(ledger=path).load().generate([request], SAMPLING)
    config = scripted.config(ledger=path, **other.get("config", {}))
    request = replace(request, **other.get("request", {}))
    for _ in range(2):
        config.load().generate([request], other.get("sampling", SAMPLING))
    assert len(scripted.bodies) == 2


def test_where_the_server_is_decides_nothing(scripted, path):
    scripted.config(ledger=path).load().generate(asks(2), SAMPLING)
    gone = scripted.config(ledger=path, base_url="http://127.0.0.1:9/v1", concurrency=1).load()
    assert [g.text for g in gone.generate(asks(2), SAMPLING)] == ["fine", "fine"]


def test_equal_requests_of_one_call_are_asked_once(scripted, path):
    made = scripted.config(ledger=path).load().generate(asks(1) * 3, SAMPLING)
    assert [g.id for g in made] == ["r0"] * 3
    assert len(scripted.bodies) == 1


def test_two_samples_are_two_where_the_seed_is_not_sent(scripted, path):
    requests = [Request(id=f"x/try{n}", prompt=user("say 0")) for n in (1, 2)]
    scripted.config(ledger=path, extra={"seed": None}).load().generate(requests, SAMPLING)
    assert len(scripted.bodies) == 2
    assert scripted.bodies[0] == scripted.bodies[1]


CLIENT = """
import sys
from pathlib import Path
from mmalign.generate.base import Request, Sampling
from mmalign.generate.server import ServerConfig
from mmalign.records import user
config = ServerConfig(
    model="m", base_url=sys.argv[1], ledger=Path(sys.argv[2]), concurrency=2, backoff_seconds=0.01
)
requests = [Request(id=f"r{n}", prompt=user(f"say {n}")) for n in range(8)]
for made in config.load().generate(requests, Sampling()):
    print(made.text)
"""


def test_a_killed_process_loses_only_what_was_on_its_way(scripted, path):
    """The first four are answered, the rest hang until the client is killed with SIGKILL."""
    hanging = {"hang": True}
    scripted.script = lambda body, number: (
        echo(body, number) | ({"delay": 5.0} if hanging["hang"] and number > 4 else {})
    )
    command = [sys.executable, "-c", CLIENT, scripted.url, str(path)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    started = time.monotonic()
    while not (path.exists() and path.read_bytes().count(b"\n") == 4 == len(scripted.bodies) - 2):
        assert time.monotonic() - started < 60
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hanging["hang"] = False
    kept = {row["id"].replace("r", "say ") for row in rows(path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"say {n}…?" for n in range(8)]
    assert all(scripted.texts.count(text) == 1 for text in kept)
    assert len(scripted.bodies) == 8 + 2


@pytest.mark.parametrize("keep", [1, 40, -1], ids=["a_brace", "half", "all_but_the_end"])
def test_a_line_cut_by_a_crash_is_asked_again(scripted, path, keep, caplog):
    config = scripted.config(ledger=path, concurrency=1)
    config.load().generate(asks(3), SAMPLING)
    lines = path.read_bytes().splitlines(keepends=True)
    torn = lines[-1][:keep]
    path.write_bytes(b"".join(lines[:-1]) + torn)
    whole = keep == -1
    for _ in range(2):
        assert len(config.load().generate(asks(4), SAMPLING)) == 4
    assert len(scripted.bodies) == 3 + (1 if whole else 2)
    assert path.read_bytes().splitlines()[2] == torn
    assert Ledger(path).spent("m").num_answers == 4
    assert ("cut short" in caplog.text) == (not whole)


def test_another_file_is_not_taken_for_a_ledger(scripted, path):
    path.parent.mkdir()
    path.write_text('{"id": "a", "prompt": "of somebody"}\n')
    with pytest.raises(DataError, match="is no line of a ledger"):
        scripted.config(ledger=path).load()
    assert path.read_text() == '{"id": "a", "prompt": "of somebody"}\n'


def test_where_no_file_can_be_is_no_ledger(scripted, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file/answers.jsonl"):
        with pytest.raises(DataError, match="cannot be used"):
            scripted.config(ledger=path).load()


WRITER = """
import sys
from pathlib import Path
from mmalign.generate.ledger import Answer, Ledger
ledger, name = Ledger(Path(sys.argv[1])), sys.argv[2]
for number in range(60):
    text = f"{name} {number} " + "x" * 5000
    answer = Answer(text=text, finish_reason="stop", prompt_tokens=10, completion_tokens=5)
    ledger.add(f"{name}-{number}", answer, model=name, request_id=str(number))
"""


def test_processes_share_a_ledger(path):
    ledger = Ledger(path)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(rows(path)) == 180
    for name in "abc":
        for number in range(60):
            found = ledger.get(f"{name}-{number}")
            assert found is not None
            assert found.text.startswith(f"{name} {number} x")
        assert ledger.spent(name) == Spent(num_answers=60, num_tokens=900)


def test_what_another_process_answered_meanwhile_is_not_asked(scripted, path):
    one, other = (scripted.config(ledger=path).load() for _ in range(2))
    one.generate(asks(3), SAMPLING)
    assert len(other.generate(asks(4), SAMPLING)) == 4
    assert len(scripted.bodies) == 4


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_budget_of_requests_is_kept_to_the_letter(scripted, path, concurrency):
    scripted.script = lambda body, number: echo(body, number) | {"delay": 0.01}
    settings = {"ledger": path, "concurrency": concurrency}
    for _ in range(2):
        with pytest.raises(BudgetReached, match=r"max_requests.*got 5; wanted less than 5\. Raise"):
            scripted.config(**settings, max_requests=5).load().generate(asks(20), SAMPLING)
    assert len(scripted.bodies) == len(rows(path)) == 5
    made = scripted.config(**settings, max_requests=20).load().generate(asks(20), SAMPLING)
    assert [g.text for g in made] == [f"say {n}…?" for n in range(20)]
    assert len(scripted.bodies) == 20


def test_a_budget_of_tokens_counts_prompts_and_answers(scripted, path):
    settings = {"ledger": path, "concurrency": 1}
    # 15 tokens each: after the third, 45 are spent.
    with pytest.raises(BudgetReached, match=r"max_total_tokens is reached.*got 45"):
        scripted.config(**settings, max_total_tokens=31).load().generate(asks(5), SAMPLING)
    assert len(scripted.bodies) == 3
    other = scripted.config(**settings, max_total_tokens=31, model="other").load()
    assert len(other.generate(asks(2), SAMPLING)) == 2


def test_a_refusal_keeps_what_was_answered(scripted, path):
    scripted.script = lambda body, number: {"status": 400} if number == 4 else {"delay": 0.01}
    config = scripted.config(ledger=path, concurrency=2)
    with pytest.raises(ModelError, match="status 400"):
        config.load().generate(asks(100), SAMPLING)
    num_kept = len(rows(path))
    # All that were asked but the refused one, those on their way included; then no more.
    assert 3 <= num_kept < 50
    assert len(scripted.bodies) == num_kept + 1
