"""How much people, as judges stand in for them, would prefer a diffusion model's pictures.

Every model draws the same prompts from the same noise, and every judge scores every picture.
Against a base (`mmalign eval compare`, `mmalign report`) each judge gives a win rate: the share of
pictures that it scores above the base's picture of the same prompt and noise, ties counted half.

runs/eval/mapo/
  pictures/3f2a….png   every picture, kept when a killed run continues
  pictures.jsonl       which picture is of what, drawn by what
  scores.jsonl         every score, by picture and judge
  items/image_preference.jsonl, results.json   as other evaluations have them
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from evals.base import Row, Split, Suite, digest, read_jsonl
from evals.rules import Rules
from evals.stats import Ratio, mean, ratio
from mmalign import log
from mmalign.config import Strict
from mmalign.diffusion.config import DiffusionConfig
from mmalign.diffusion.judging import AnyJudge
from mmalign.diffusion.prompts import read_prompts
from mmalign.diffusion.sampling import Draw, ImageSampling, named
from mmalign.errors import DataError
from mmalign.media import open_image
from mmalign.records import Media
from mmalign.store import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmalign.diffusion.judging import ImageJudge
    from mmalign.diffusion.sampling import ImageSampler

PICTURES, DRAWN, SCORES = "pictures", "pictures.jsonl", "scores.jsonl"
BENCHMARK = "image_preference"
WINS = "win/"
# Pictures scored between two writes.
AT_ONCE = 64


class ImagePreferenceRecipe(Strict):
    """One evaluation of a diffusion model.

    prompts: what mmalign.diffusion.prompts reads; limit: only the first so many. per_prompt:
    pictures of each, from different noise. seed: of the noise, so compare runs of one seed, and of
    the bootstrap. judges: each once. split: a name of your own for the suite.
    """

    name: str
    model: DiffusionConfig
    output: Path
    prompts: Path
    split: Split | None = None
    limit: PositiveInt | None = None
    per_prompt: PositiveInt = 1
    sampling: ImageSampling = ImageSampling()
    judges: list[AnyJudge] = Field(min_length=1)
    bootstrap_samples: PositiveInt = 2000
    seed: int = 0

    @field_validator("judges")
    @classmethod
    def _differ(cls, judges: list[Any]) -> list[Any]:
        names = [judge.name for judge in judges]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there twice")
        return judges

    @property
    def key(self) -> str:
        """The suite's name."""
        return "-".join(filter(None, (BENCHMARK, self.split)))


def evaluate(
    recipe: ImagePreferenceRecipe,
    sampler: ImageSampler | None = None,
    judges: Mapping[str, ImageJudge] | None = None,
) -> Path:
    """Draw the pictures that are not there yet, score them, write items and results.

    sampler, judges (by their config's name): what is loaded already. Returns the output folder.
    """
    from evals.run import write_results

    prompts = {
        f"{prompt.id}/{number}": prompt
        for prompt in read_prompts(recipe.prompts)[: recipe.limit]
        for number in range(recipe.per_prompt)
    }
    model = named(recipe.model) if sampler is None else sampler.name
    draws = [Draw(id=id, prompt=one.text, seed=recipe.seed) for id, one in prompts.items()]
    keys = {draw.id: _key(model, recipe, draw) for draw in draws}
    (recipe.output / PICTURES).mkdir(parents=True, exist_ok=True)
    _draw(recipe, sampler, draws, keys)
    scores = {judge.name: _scored(recipe, judge, judges, draws, keys) for judge in recipe.judges}
    items: list[Row] = [
        {
            "id": draw.id,
            "prompt": draw.prompt,
            "cluster": prompts[draw.id].id,
            "image": _file(draw.id),
            "answer": _file(draw.id),
            "scores": {name: found[draw.id] for name, found in scores.items()},
        }
        for draw in draws
    ]
    suite = Suite(
        key=recipe.key,
        benchmark=BENCHMARK,
        split=recipe.split,
        images=recipe.output / PICTURES,
        method="mean score of each judge over all pictures; pictures of one prompt drawn together",
        items=items,
        metrics=metrics(items),
        num_unparsed=0,
    )
    fingerprint = digest([model, recipe.model.model_dump(mode="json")])
    write_results(recipe.output, recipe, {"name": model, "fingerprint": fingerprint}, [suite])
    return recipe.output


def metrics(items: Sequence[Row]) -> dict[str, Ratio]:
    """The mean of each judge's scores."""
    return {name: mean([row["scores"][name] for row in items]) for name in items[0]["scores"]}


def win_rates(a: Sequence[Row], b: Sequence[Row]) -> dict[str, tuple[Ratio, Ratio]]:
    """For each judge of both: a half, which is a against itself, and how often b wins against a.

    A win counts 1, a tie 1/2.
    """
    found: dict[str, tuple[Ratio, Ratio]] = {}
    for name in a[0]["scores"]:
        if name in b[0]["scores"]:
            ours = np.array([row["scores"][name] for row in b])
            theirs = np.array([row["scores"][name] for row in a])
            won = (ours > theirs) + 0.5 * (ours == theirs)
            found[WINS + name] = (ratio(np.full(len(won), 0.5), np.ones(len(won))), mean(won))
    return found


def _draw(
    recipe: ImagePreferenceRecipe,
    sampler: ImageSampler | None,
    draws: Sequence[Draw],
    keys: Mapping[str, str],
) -> None:
    """Draw what is not there, and say of each picture what it is of once its file is whole."""
    folder, told = recipe.output / PICTURES, recipe.output / DRAWN
    known = {row["key"] for _, row in _lines(told)}
    left = [d for d in draws if keys[d.id] not in known or not (folder / _file(d.id)).exists()]
    if not left:
        return
    if sampler is None:
        from mmalign.diffusion.sampling import ImageSampler

        sampler = ImageSampler.from_checkpoint(recipe.model, recipe.sampling)
    size = recipe.sampling.batch_size
    batches = [left[start : start + size] for start in range(0, len(left), size)]
    with open(told, "a", encoding="utf-8") as file:
        for batch in log.progress(batches, label=recipe.name, total=len(batches)):
            for draw, picture in zip(batch, sampler.draw(batch), strict=True):
                _save(picture, folder / _file(draw.id))
                file.write(json.dumps({"key": keys[draw.id], **dataclasses.asdict(draw)}) + "\n")
            file.flush()


def _scored(
    recipe: ImagePreferenceRecipe,
    config: Any,
    judges: Mapping[str, ImageJudge] | None,
    draws: Sequence[Draw],
    keys: Mapping[str, str],
) -> dict[str, float]:
    """Each picture's score by id, from scores.jsonl where it stands there."""
    told = recipe.output / SCORES
    settings = config.model_dump(mode="json", exclude={"device", "batch_size"})
    judged = {draw.id: digest([keys[draw.id], settings]) for draw in draws}
    known = {row["key"]: float(row["score"]) for _, row in _lines(told)}
    left = [draw for draw in draws if judged[draw.id] not in known]
    if left:
        judge = config.load() if judges is None else judges[config.name]
        root = recipe.output / PICTURES
        batches = [left[start : start + AT_ONCE] for start in range(0, len(left), AT_ONCE)]
        with open(told, "a", encoding="utf-8") as file:
            for batch in log.progress(batches, label=config.name, total=len(batches)):
                pictures = [open_image(Media(path=_file(draw.id)), root) for draw in batch]
                scores = judge.score([draw.prompt for draw in batch], pictures)
                for draw, score in zip(batch, scores, strict=True):
                    known[judged[draw.id]] = score
                    line = {"key": judged[draw.id], "id": draw.id, "judge": judge.name}
                    file.write(json.dumps({**line, "score": score}) + "\n")
                file.flush()
    return {draw.id: known[judged[draw.id]] for draw in draws}


def _key(model: str, recipe: ImagePreferenceRecipe, draw: Draw) -> str:
    """Changes with whatever may change the picture."""
    sampling = recipe.sampling.model_dump(mode="json", exclude={"batch_size"})
    settings = recipe.model.model_dump(mode="json")
    return digest([model, settings, sampling, dataclasses.asdict(draw)])


def _file(id: str) -> str:
    """The same for every model, so that pictures of one prompt and noise are found together."""
    return f"{hashlib.sha256(id.encode()).hexdigest()[:16]}.png"


def _save(picture: Image, path: Path) -> None:
    from io import BytesIO

    sink = BytesIO()
    picture.save(sink, format="PNG")
    write_atomically(path, sink.getvalue())


def _lines(path: Path) -> list[tuple[str, Row]]:
    """Lines of a file that is only ever appended to; one that a kill cut short is removed."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomically(path, whole)
    rows = list(read_jsonl(path))
    for where, row in rows:
        if "key" not in row:
            raise DataError("has no key", where=where, fix="delete the line")
    return rows


RULES = Rules(
    metrics=metrics,
    read=("scores",),
    same=("prompt",),
    paired=win_rates,
    items="pictures",
    meaning="Every model drew the same prompts from the same noise, and each judge "
    "scored every picture. Wins are the share of pictures that a judge scores above base's picture "
    "of the same prompt and noise, ties counted half; their difference is from the 50 % at which "
    "base would stand against itself.",
)
