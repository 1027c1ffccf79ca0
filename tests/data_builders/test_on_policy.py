"""On-policy pairs: the policy's own words are rejected where they differ from the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_builders.base import GeneratorConfig, OverlapFilter
from data_builders.on_policy import OnPolicy
from mmalign.generate.base import Generation, Request, Sampling
from mmalign.models.load import ModelConfig
from mmalign.records import Example, Media, Preference, Span, user
from mmalign.similarity import TokenOverlap
from mmalign.store import Dataset, open_dataset, write_dataset


class Policy:
    """Says what the script says for the example, try after try."""

    name = "policy"

    def __init__(self, says: dict[str, list[str]]) -> None:
        self.says, self.asked, self.samplings = says, list[Request](), list[Sampling]()

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        self.asked += requests
        self.samplings.append(sampling)
        made = []
        for request in requests:
            name, _, number = request.id.partition("/try")
            text = self.says[name][int(number) - 1]
            finished = not text.endswith("…")
            made.append(Generation(id=request.id, text=text, num_tokens=1, finished=finished))
        return made


ROWS = [
    Example(id="a", prompt=user("What?"), answer="a red three"),
    Example(id="b", prompt=user("What?"), answer="a blue one"),
    Example(id="c", prompt=user("What?"), answer=None),
    Example(id="d", prompt=user("Else?"), answer="two"),
]


def build(tmp_path: Path, policy: Policy, rows=ROWS, **changes) -> Dataset[Preference]:
    write_dataset(tmp_path / "in", Example, rows)
    settings = {
        "source": tmp_path / "in",
        "output": tmp_path / "out",
        "generator": GeneratorConfig(model=ModelConfig(path="none"), temperature=0.7),
        "similarity": OverlapFilter(threshold=0.9),
        "tries": 3,
        "seed": 5,
    }
    config = OnPolicy(**(settings | changes))
    config.build_with(policy, TokenOverlap())
    return open_dataset(tmp_path / "out", Preference)


SAYS = {
    "a": ["a red seven", "never asked", "never asked"],
    "b": ["a blue one", "a blue four and…", "a blue eight\n"],
    "d": ["two", " ", "two!"],
}


def test_the_first_response_that_differs_is_rejected(tmp_path: Path) -> None:
    policy = Policy(SAYS)
    dataset = build(tmp_path, policy)
    pairs = {pair.id: pair for pair in dataset}
    assert {name: (p.chosen, p.rejected) for name, p in pairs.items()} == {
        "a": ("a red three", "a red seven"),
        "b": ("a blue one", "a blue eight"),
    }
    assert pairs["b"].origin.reason == "accepted:try3"
    assert pairs["a"].prompt == user("What?")
    # "three" and "seven", characters 6 to 11 of both
    assert pairs["a"].chosen_spans == pairs["a"].rejected_spans
    assert pairs["a"].chosen_spans == (Span(start=6, end=11, phrase=1),)
    assert dataset.manifest.counts == {
        "accepted:try1": 1,
        "accepted:try3": 1,
        "dropped:no_try_accepted": 1,
        "dropped:no_answer": 1,
    }
    asked = [request.id for request in policy.asked]
    assert asked == ["a/try1", "b/try1", "d/try1", "b/try2", "d/try2", "b/try3", "d/try3"]
    assert {(s.temperature, s.seed) for s in policy.samplings} == {(0.7, 5)}
    assert (tmp_path / "out/preview.html").exists()


def test_clips_are_asked_about_and_kept(tmp_path: Path) -> None:
    clip = (Media(path="clip.mp4"),)
    rows = [Example(id="a", prompt=user("What?", videos=1), videos=clip, answer="a red three")]
    policy = Policy(SAYS)
    assert build(tmp_path, policy, rows)[0].videos == clip
    assert policy.asked[0].videos == clip


def test_fewer_tries_drop_more(tmp_path: Path) -> None:
    counts = build(tmp_path, Policy(SAYS), tries=2).manifest.counts
    assert counts["dropped:no_try_accepted"] == 2


def test_chunks_change_nothing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = build(tmp_path / "one", Policy(SAYS), shard_rows=100)
    two = build(tmp_path / "two", Policy(SAYS), shard_rows=1)
    assert list(one) == list(two)
    assert one.manifest.shards != two.manifest.shards


def test_no_tries_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        build(tmp_path, Policy(SAYS), tries=0)
