"""Pairs of pictures by a pipeline: by prefix, by judge, resumed, and the page that shows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_builders.config import load_builder
from data_builders.image_pairs import ImagePairs
from mmalign.config import dump_yaml, validate
from mmalign.diffusion.sampling import Draw
from mmalign.diffusion.tiny import TinyPipeline
from mmalign.errors import ConfigError, DataError
from mmalign.generate.base import request_seed
from mmalign.media import open_image
from mmalign.records import ImagePreference
from mmalign.store import MANIFEST, open_dataset

PREFIX = {"by": "prefix", "chosen": "bold"}
JUDGE = {"by": "judge", "judge": {"name": "digit_style", "style": "bold"}, "candidates": 3}


class Painter:
    """Draws grey squares: as dark as the noise's seed says, darker by half for "bold"."""

    name = "painter"

    def __init__(self) -> None:
        self.drawn: list[Draw] = []

    def draw(self, draws: list[Draw]) -> list[Image.Image]:
        self.drawn += draws
        return [Image.new("RGB", (32, 32), (self.grey(one),) * 3) for one in draws]

    @staticmethod
    def grey(draw: Draw) -> int:
        grey = 120 + request_seed(draw.seed, draw.id) % 100
        return grey // 2 if draw.prompt.startswith("bold") else grey


class Ink:
    name = "ink"

    def score(self, prompts: list[str], pictures: list[Image.Image]) -> list[float]:
        assert not any(prompt.startswith("bold") for prompt in prompts)
        return [-float(np.asarray(picture).mean()) for picture in pictures]


def builder(tmp_path: Path, pairs: dict[str, Any], **settings: Any) -> ImagePairs:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("seven\nthree\nnine\n")
    values = {
        "source": str(prompts),
        "output": str(tmp_path / "pairs"),
        "pipeline": {"path": "unused"},
        "pairs": pairs,
        **settings,
    }
    return validate(values, ImagePairs, "test")


def built(made: ImagePairs, judge: Any = None) -> tuple[Any, list[ImagePreference]]:
    made.build_with(Painter(), judge)  # type: ignore[arg-type]
    dataset = open_dataset(made.output, ImagePreference)
    return dataset.manifest, list(dataset)


def grey_of(media: Any) -> int:
    return int(np.asarray(open_image(media))[0, 0, 0])


def test_by_prefix_both_sides_come_from_one_noise(tmp_path):
    manifest, rows = built(builder(tmp_path, PREFIX, per_prompt=2))
    assert manifest.counts == {"accepted": 6}
    assert [row.prompt for row in rows] == ["seven"] * 2 + ["three"] * 2 + ["nine"] * 2
    assert len({row.id for row in rows}) == 6
    for row in rows:
        assert grey_of(row.chosen) == grey_of(row.rejected) // 2
        assert json.loads(row.origin.detail) == {
            "chosen_prompt": f"bold {row.prompt}",
            "rejected_prompt": row.prompt,
        }
    assert len({grey_of(row.rejected) for row in rows}) > 1


def test_a_judge_keeps_the_prefix_pairs_that_it_agrees_with(tmp_path):
    """Chosen is darker by half: by 60 to 110 of 255."""
    pairs = PREFIX | {"judge": JUDGE["judge"], "min_gap": 75.0}
    manifest, rows = built(builder(tmp_path, pairs, per_prompt=8), Ink())
    gaps = [grey_of(row.rejected) - grey_of(row.chosen) for row in rows]
    assert all(gap > 75 for gap in gaps)
    assert manifest.counts == {"accepted": len(rows), "dropped:gap_too_small": 24 - len(rows)}
    assert 0 < len(rows) < 24
    for row, gap in zip(rows, gaps, strict=True):
        detail = json.loads(row.origin.detail)
        assert detail["chosen_score"] - detail["rejected_score"] == gap
    other = {"by": "prefix", "rejected": "bold", "judge": JUDGE["judge"]}
    manifest, rows = built(builder(tmp_path, other, output=str(tmp_path / "other")), Ink())
    assert (manifest.counts, rows) == ({"dropped:judge_disagrees": 3}, [])


def test_a_judge_may_ask_for_a_score_alone(tmp_path):
    """Darkness is minus the grey level; a pair need not have its chosen picture preferred."""
    pairs = {"by": "prefix", "rejected": "bold", "judge": JUDGE["judge"], "min_score": -170.0}
    manifest, rows = built(builder(tmp_path, pairs, per_prompt=8), Ink())
    assert all(grey_of(row.chosen) <= 170 for row in rows)
    assert manifest.counts == {"accepted": len(rows), "dropped:score_too_low": 24 - len(rows)}
    assert 0 < len(rows) < 24
    both = pairs | {"min_gap": 1.0}
    manifest, rows = built(builder(tmp_path, both, output=str(tmp_path / "both")), Ink())
    assert rows == []
    assert set(manifest.counts) == {"dropped:score_too_low", "dropped:judge_disagrees"}


def test_by_judge_the_best_and_the_worst_are_the_pair(tmp_path):
    made = builder(tmp_path, JUDGE, seed=3)
    _, rows = built(made, Ink())
    for row in rows:
        greys = [
            Painter.grey(Draw(id=f"{row.id}/{number}", prompt=row.prompt, seed=3))
            for number in range(3)
        ]
        assert (grey_of(row.chosen), grey_of(row.rejected)) == (min(greys), max(greys))


def test_equal_pictures_are_no_pair(tmp_path):
    class Constant(Painter):
        def draw(self, draws: list[Draw]) -> list[Image.Image]:
            return [Image.new("RGB", (32, 32))] * len(draws)

    made = builder(tmp_path, PREFIX)
    made.build_with(Constant())  # type: ignore[arg-type]
    assert open_dataset(made.output).manifest.counts == {"dropped:same_image": 3}


def test_a_build_that_stopped_goes_on_and_ends_in_the_same_bytes(tmp_path):
    whole = builder(tmp_path, PREFIX, shard_rows=1)
    whole.build_with(Painter())  # type: ignore[arg-type]
    cut = builder(tmp_path, PREFIX, shard_rows=1, output=str(tmp_path / "cut"))
    shutil.copytree(whole.output, cut.output)
    (cut.output / MANIFEST).unlink()
    (cut.output / "progress" / "shard-00001.json").unlink()
    painter = Painter()
    cut.build_with(painter)  # type: ignore[arg-type]
    assert len(painter.drawn) == 2
    assert open_dataset(cut.output).manifest == open_dataset(whole.output).manifest


def test_the_page_shows_both_pictures_with_their_scores(tmp_path):
    made = builder(tmp_path, JUDGE)
    built(made, Ink())
    page = (made.output / "preview.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "chosen, -1" in page
    assert "rejected, -" in page
    assert "painter" in page


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ({"by": "prefix", "chosen": "bold", "rejected": " bold "}, "one prefix"),
        ({"by": "prefix", "chosen": "bold", "min_gap": 1.0}, "give a judge"),
        (JUDGE | {"candidates": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_make_no_pairs_are_refused(tmp_path, pairs, told):
    with pytest.raises(ConfigError, match=told):
        builder(tmp_path, pairs)


def test_prompts_that_are_not_there_are_told_before_a_model_is_loaded(tmp_path):
    made = builder(tmp_path, PREFIX, source=str(tmp_path / "absent.txt"))
    with pytest.raises(DataError, match=r"absent\.txt"):
        made.build()


@pytest.mark.parametrize("pipeline", ["sdxl", "sd3"])
def test_a_real_pipeline_and_a_real_judge_from_a_config_file(tmp_path, pipeline):
    folder = TinyPipeline(output=tmp_path / pipeline, pipeline=pipeline, words=("bold",)).build()
    made = builder(
        tmp_path,
        JUDGE,
        pipeline={"path": str(folder)},
        sampling={"num_steps": 1, "guidance": 1.0, "size": 32},
    )
    (tmp_path / "build.yaml").write_text(dump_yaml(made))
    assert load_builder(tmp_path / "build.yaml").build() == made.output
    dataset = open_dataset(made.output, ImagePreference)
    assert dataset.manifest.model["judge"] == "digit_style:bold"
    for row in dataset:
        scores = json.loads(row.origin.detail)
        assert scores["chosen_score"] > scores["rejected_score"]
