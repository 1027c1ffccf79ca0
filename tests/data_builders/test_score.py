"""Rewards written into pairs and rankings, in chunks that can be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_builders.score import Score
from mmalign.cli import run
from mmalign.config import dump_yaml, validate
from mmalign.errors import DataError, MediaError
from mmalign.media import embed
from mmalign.models.load import ModelConfig, load_policy
from mmalign.models.tiny import TinyModel, Tower
from mmalign.prepare import RowDropped
from mmalign.records import Example, Media, Preference, RankedResponse, Ranking, user
from mmalign.reward import Critics, Judged
from mmalign.store import open_dataset, write_dataset

PICTURE = embed(Image.new("RGB", (16, 16), "red"))


class Model:
    """A response is worth its length; "?" cannot be asked about, and unread.png not be read."""

    name = "lengths"

    def __init__(self, *, dies_at: str | None = None) -> None:
        self.dies_at, self.asked, self.seeds = dies_at, list[str](), set[int]()

    def judge(self, items, critics: Critics, *, seed: int = 0) -> list[Judged]:
        self.seeds.add(seed)
        for item in items:
            if item.id.startswith(f"{self.dies_at}/"):
                raise KeyboardInterrupt
            if item.response == "?":
                raise RowDropped("control_token", "cannot be asked", where=item.id)
            if any(image.path == "unread.png" for image in item.images):
                raise MediaError("cannot be read", where=item.id)
        self.asked += [item.id for item in items]
        return [
            Judged(
                id=item.id, reward=float(len(item.response)), critiques=(f"of {item.response}",),
                num_cut=int(item.response.endswith("…")),
            )
            for item in items
        ]  # fmt: skip


def pair(name: str, chosen: str, rejected: str, **changes) -> Preference:
    values = {"prompt": user("What?", images=1), "images": (PICTURE,)}
    return Preference(id=name, chosen=chosen, rejected=rejected, **(values | changes))


PAIRS = [
    pair("d", "long", "longer", chosen_critique="mine", p_target=0.7),
    pair("a", "a dog", "cat", score_gap=-9.0),
    pair("b", "fine", "?"),
    pair("c", "cut…", "x", images=(PICTURE,)),
    pair("e", "x", "yy", images=(Media(path="unread.png"),)),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "in", Preference, PAIRS, builder="test")
    return tmp_path / "in"


def build(source: Path, model: Model, out: str = "out", **changes):
    values = {"source": source, "output": source.parent / out, "model": ModelConfig(path="none")}
    return open_dataset(Score(**(values | changes)).build_with(model))  # type: ignore[arg-type]


def test_a_pair_gets_its_gap_and_keeps_all_else(source):
    dataset = build(source, Model(), seed=4)
    rows = {row.id: row for row in dataset}
    assert {name: row.score_gap for name, row in rows.items()} == {"a": 2.0, "c": 3.0, "d": -2.0}
    before = {row.id: row for row in PAIRS}
    for name, row in rows.items():
        for column in ("prompt", "images", "chosen", "rejected", "p_target", "chosen_critique"):
            assert getattr(row, column) == getattr(before[name], column)
    assert rows["a"].chosen_critique is None
    assert dataset.manifest.counts == {
        "accepted": 2,
        "accepted:critique_cut": 1,
        "dropped:control_token": 1,
        "quarantined:unreadable": 1,
    }
    assert dataset.manifest.model == {"reward_model": "lengths"}
    assert (dataset.manifest.builder, dataset.manifest.seed) == ("score", 4)


def test_written_critiques_are_kept_on_request_where_there_are_none(source):
    rows = {row.id: row for row in build(source, Model(), keep_critiques=True)}
    assert (rows["a"].chosen_critique, rows["a"].rejected_critique) == ("of a dog", "of cat")
    assert (rows["d"].chosen_critique, rows["d"].rejected_critique) == ("mine", "of longer")


def test_a_ranking_gets_a_score_for_each_response(tmp_path):
    responses = (
        RankedResponse(text="long", rank=1, score=4.5, critique="mine", model="m"),
        RankedResponse(text="a", rank=0),
    )
    rows = [Ranking(id="r", prompt=user("What?"), responses=responses)]
    write_dataset(tmp_path / "in", Ranking, rows, builder="test")
    (row,) = build(tmp_path / "in", Model(), keep_critiques=True)
    assert row.responses == (
        RankedResponse(text="long", rank=1, score=4.0, critique="mine", model="m"),
        RankedResponse(text="a", rank=0, score=1.0, critique="of a"),
    )


def test_a_killed_build_goes_on_where_it_stopped(source):
    whole = list(build(source, Model(), "whole", shard_rows=2))
    with pytest.raises(KeyboardInterrupt):
        build(source, Model(dies_at="d"), shard_rows=2)
    again = Model()
    assert list(build(source, again, shard_rows=2)) == whole
    assert set(again.asked) == {"c/0", "c/1", "d/0", "d/1"}


def test_shards_of_two_processes_make_one_dataset(source):
    whole = list(build(source, Model(), "whole", shard_rows=1))
    with pytest.raises(DataError, match="not a complete dataset"):
        build(source, Model(), shard_rows=1, shard="0/2")
    assert list(build(source, Model(), shard_rows=1, shard="1/2")) == whole


def test_embedded_media_let_the_directory_move(tmp_path):
    media = tmp_path / "in" / "media"
    media.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(media / "a.png")
    rows = [pair("a", "x", "yy", images=(Media(path="a.png"),), contrast_images=(PICTURE,))]
    write_dataset(tmp_path / "in", Preference, rows, builder="test")
    (row,) = build(tmp_path / "in", Model(), embed_media=True)
    assert row.images[0].bytes == (media / "a.png").read_bytes()
    kept = build(tmp_path / "in", Model(), "kept")
    assert kept[0].images == (Media(path="a.png"),)
    assert kept.media_root == media


def test_examples_hold_nothing_to_score(tmp_path):
    write_dataset(tmp_path / "in", Example, [Example(id="e", prompt=user("Hi"))], builder="test")
    config = Score(
        source=tmp_path / "in", output=tmp_path / "out", model=ModelConfig(path="anywhere")
    )
    with pytest.raises(DataError, match=r"nothing to score; got example records; wanted pref"):
        config.build()


def test_the_command_scores_with_a_real_model(tmp_path, source, capsys):
    small = Tower(hidden=32, layers=1, heads=4, mlp=32)
    base = TinyModel(output=str(tmp_path / "base"), image_size=16, vision=small, text=small).build()
    head = {"prompt": "{question} {response}"}
    config = {"path": str(base), "reward_head": head}
    load_policy(validate(config, ModelConfig, "test")).save(tmp_path / "model")
    score = Score(
        source=source,
        output=tmp_path / "out",
        model=ModelConfig(path=str(tmp_path / "model")),
        critics=Critics(max_new_tokens=3),
    )
    (tmp_path / "score.yaml").write_text(dump_yaml(score))
    assert run(["build", str(tmp_path / "score.yaml")]) == 0
    rows = list(open_dataset(tmp_path / "out", Preference))
    assert [row.id for row in rows] == ["a", "b", "c", "d"]
    assert all(row.score_gap for row in rows)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert run(["build", str(tmp_path / "score.yaml")]) == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert run(["build", str(tmp_path / "score.yaml"), f"model.path={base}"]) == 2
    assert "has no reward head" in capsys.readouterr().err
