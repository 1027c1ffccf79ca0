"""Run a recipe: ask what has not been answered yet, score every answer, write the results.

runs/eval/base/
  answers.jsonl      every answer, appended as it comes; a killed run continues from here
  model.json         which model the answers are of
  items/<suite>.jsonl
  results.json       written last: no results, not complete
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evals.answer_files import ANSWERS, Answer, line_of, read_answers, read_model, write_model
from evals.base import Benchmark, Row, Suite, cluster_of
from evals.config import EvalRecipe
from evals.image_preference import ImagePreferenceRecipe
from evals.reward_pairs import RewardPairs
from evals.stats import intervals
from evals.verifiable import VerifiableBench
from mmalign import log
from mmalign.clips import Clip
from mmalign.engines import Deferred
from mmalign.errors import DataError, MediaError, ModelError
from mmalign.generate.base import Generation, Generator, Request, Sampling
from mmalign.media import media_key
from mmalign.records import Media
from mmalign.store import write_atomically

RESULTS = "results.json"
PACKAGES = ("mmalign", "numpy", "torch", "transformers")

# Batches generated between two writes: a kill loses no more than these, of each worker.
_BATCHES = 4
# Some requests to one benchmark, by its place in the recipe.
_Chunk = tuple[int, list[Request]]
# Most benchmarks score texts; whether a response has a form hangs on more than its text.
_Benchmark = Benchmark | VerifiableBench
Asked = tuple[_Benchmark, list[Request]]
# A request's id with its answer, or why there is none.
_Reply = tuple[str, Generation | MediaError]
_logger = log.get_logger("evals")


def evaluate(recipe: EvalRecipe, generator: Generator | None = None) -> Path:
    """Run a recipe and return its output folder. Without a generator, loads the recipe's model.

    Answers already there, from the same model to the same question with the same limits, are kept.
    Questions whose picture or clip cannot be read are unanswered, and are asked again next time.
    """
    asked = asked_by(recipe)
    model, answers = answer(recipe, asked, generator)
    return _finish(recipe.output, recipe, model, asked, answers)


def asked_by(recipe: EvalRecipe) -> list[Asked]:
    """All that a recipe asks. Raises DataError where the folder of its pictures is not there."""
    asked: list[Asked] = [(benchmark, benchmark.requests()) for benchmark in recipe.benchmarks]
    for benchmark, requests in asked:
        folder = requests[0].media_root
        by_path = any(isinstance(m, Media) and m.bytes is None for m in _media(requests[0]))
        if by_path and (folder is None or not folder.is_dir()):
            raise DataError(
                f"the folder of {_kind(requests)}s does not exist", where=benchmark.key, got=folder
            )
    return asked


def answer(
    recipe: EvalRecipe, asked: Sequence[Asked], generator: Generator | None = None
) -> tuple[dict[str, str], dict[str, Answer]]:
    """Answer what is asked and not answered yet, into the recipe's output.

    Returns the model's name and fingerprint, and all answers that are there, by key.
    """
    loaded = Deferred(partial(_load, recipe) if generator is None else lambda: generator)
    with recipe.engine.open():
        name = recipe.engine.call(lambda: loaded.value.name)
        fingerprint = _sha256([name, recipe.model.model_dump(mode="json")])
        model = {"name": name, "fingerprint": fingerprint}
        write_model(recipe.output, model)
        answers = read_answers(recipe.output)
        _ask(recipe, loaded, asked, fingerprint, answers)
    return model, answers


def _ask(
    recipe: EvalRecipe,
    loaded: Deferred[Generator],
    asked: Sequence[Asked],
    fingerprint: str,
    answers: dict[str, Answer],
) -> None:
    """Generate the answers that are not there yet, and append each chunk's when it comes."""
    keys = [_keys(benchmark, requests, fingerprint) for benchmark, requests in asked]
    done = {key for key, answer in answers.items() if answer.text is not None}
    size = _BATCHES * recipe.batch_size
    chunks: list[_Chunk] = []
    for number, (_, requests) in enumerate(asked):
        left = [request for request in requests if keys[number][request.id] not in done]
        chunks += [(number, left[i : i + size]) for i in range(0, len(left), size)]

    def told(chunk: _Chunk) -> str:
        number, requests = chunk
        where = f"{asked[number][0].key} stopped at {requests[0].id} … {requests[-1].id}"
        return f"{where}; the answers so far are kept in {recipe.output}"

    answering = _Answering(
        [Deferred(partial(_answerer, benchmark, loaded)) for benchmark, _ in asked],
        [_sampling(benchmark) for benchmark, _ in asked],
    )
    arriving = recipe.engine.run(answering, chunks, told)
    with open(recipe.output / ANSWERS, "a", encoding="utf-8", newline="\n") as file:
        for number, replies in log.progress(arriving, label=recipe.name, total=len(chunks)):
            for id, made in replies:
                if isinstance(made, MediaError):
                    _logger.warning("%s stays unanswered: %s", id, made)
                whole = made if isinstance(made, Generation) else None
                answer = Answer(
                    key=keys[number][id],
                    benchmark=asked[number][0].key,
                    id=id,
                    text=whole.text if whole else None,
                    num_tokens=whole.num_tokens if whole else 0,
                    finished=whole is not None and whole.finished,
                )
                answers[answer.key] = answer
                file.write(line_of(answer))
            file.flush()


@dataclasses.dataclass(frozen=True)
class _Answering:
    """Answers a chunk in whichever process; each of the two has an item for each benchmark."""

    answerers: list[Deferred[Generator]]
    samplings: list[Sampling]

    def __call__(self, chunk: _Chunk) -> tuple[int, list[_Reply]]:
        number, requests = chunk
        generator = self.answerers[number].value
        return number, list(_generate(generator, requests, self.samplings[number]))


def rescore(folder: str | Path, recipe: EvalRecipe) -> Path:
    """Write items and results anew from the answers in a folder, without a model.

    Raises DataError saying how many of the recipe's questions have no answer there.
    """
    folder = Path(folder)
    asked: list[Asked] = [(benchmark, benchmark.requests()) for benchmark in recipe.benchmarks]
    return _finish(folder, recipe, read_model(folder), asked, read_answers(folder))


def _finish(
    folder: Path,
    recipe: EvalRecipe,
    model: dict[str, str],
    asked: Sequence[Asked],
    answers: dict[str, Answer],
) -> Path:
    """Score every suite, then replace the folder's items and, last, its results."""
    scored: list[Suite] = []
    for benchmark, requests in asked:
        keys = _keys(benchmark, requests, model["fingerprint"])
        missing = [name for name, key in keys.items() if key not in answers]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(keys)} answers are missing, such as {missing[0]}",
                where=f"{folder / ANSWERS}, {benchmark.key}",
                fix="run the recipe to generate them; the answers already there are kept",
            )
        given = {name: answers[key] for name, key in keys.items()}
        made = {name: whole for name, answer in given.items() if (whole := _whole(name, answer))}
        if not made:
            first = requests[0]
            raise DataError(
                f"no {_kind(requests)} of its {len(keys)} questions can be read",
                where=benchmark.key,
                fix=f"check that {first.media_root} holds {_files(first)[0][0]}",
            )
        if isinstance(benchmark, VerifiableBench):
            suite = benchmark.score(made)
        else:
            suite = benchmark.score({name: whole.text for name, whole in made.items()})
        items = [{**row, "num_tokens": _num_tokens(row, given)} for row in suite.items]
        scored.append(dataclasses.replace(suite, items=items))
    return write_results(folder, recipe, model, scored)


def write_results(
    folder: Path,
    recipe: EvalRecipe | ImagePreferenceRecipe,
    model: dict[str, str],
    suites: Sequence[Suite],
) -> Path:
    """Replace the folder's items and, last, its results; returns the folder.

    model: its name and fingerprint.
    """
    (folder / RESULTS).unlink(missing_ok=True)
    for suite in suites:
        write_atomically(folder / _items(suite), "".join(map(_line, suite.items)))
    results = {
        "name": recipe.name,
        "model": model["name"],
        "fingerprint": model["fingerprint"],
        "config": recipe.model_dump(mode="json"),
        "versions": _versions(),
        "suites": [_summary(suite, recipe) for suite in suites],
    }
    write_atomically(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return folder


def _whole(name: str, answer: Answer) -> Generation | None:
    """The answer to a request as it was generated; None where there was none."""
    if answer.text is None:
        return None
    return Generation(
        id=name, text=answer.text, num_tokens=answer.num_tokens, finished=answer.finished
    )


def _num_tokens(row: Row, given: dict[str, Answer]) -> int:
    """Tokens of an item's answers; it may take several, such as those to a pair's two responses."""
    return sum(given[name].num_tokens for name in row.get("requests", [row["id"]]))


def _summary(suite: Suite, recipe: EvalRecipe | ImagePreferenceRecipe) -> dict[str, Any]:
    clusters = [cluster_of(row) for row in suite.items]
    spread = intervals(suite.metrics, clusters, samples=recipe.bootstrap_samples, seed=recipe.seed)
    return {
        "key": suite.key,
        "benchmark": suite.benchmark,
        "split": suite.split,
        "method": suite.method,
        "num_items": len(suite.items),
        "num_unparsed": suite.num_unparsed,
        "num_missing": sum(row["answer"] is None for row in suite.items),
        **{
            name: str(folder.absolute())
            for name, folder in (("images", suite.images), ("videos", suite.videos))
            if folder is not None
        },
        "metrics": {name: metric.value for name, metric in suite.metrics.items()},
        "intervals": {name: list(spread[name]) for name in suite.metrics},
        "items": _items(suite),
    }


def _load(recipe: EvalRecipe) -> Generator:
    from mmalign.generate.local import LocalGenerator
    from mmalign.models.load import ModelConfig

    config = ModelConfig(**recipe.model.model_dump())
    return LocalGenerator.from_checkpoint(config, batch_size=recipe.batch_size)


def _generate(
    generator: Generator, requests: Sequence[Request], sampling: Sampling
) -> Iterator[_Reply]:
    """Each request with its answer, or the error of a picture that cannot be read.

    A chunk that holds such a picture is halved until the picture is alone.
    """
    try:
        made = generator.generate(requests, sampling)
    except MediaError as error:
        if len(requests) == 1:
            yield requests[0].id, error
            return
        middle = len(requests) // 2
        yield from _generate(generator, requests[:middle], sampling)
        yield from _generate(generator, requests[middle:], sampling)
        return
    if [answer.id for answer in made] != [request.id for request in requests]:
        raise ModelError("did not answer each request once, in order", where=generator.name)
    yield from ((answer.id, answer) for answer in made)


def _sampling(benchmark: _Benchmark) -> Sampling:
    if isinstance(benchmark, VerifiableBench):
        return benchmark.sampling()
    return Sampling(max_new_tokens=benchmark.max_new_tokens)


def _keys(benchmark: _Benchmark, requests: Sequence[Request], fingerprint: str) -> dict[str, str]:
    """Request id to a key that changes with whatever may change the answer.

    Media count by name and hash: the folder may move, its files should not change.
    """
    decoding = dataclasses.asdict(_sampling(benchmark))
    return {
        request.id: _sha256(
            [
                fingerprint,
                benchmark.key,
                decoding,
                request.id,
                [dataclasses.asdict(message) for message in request.prompt],
                _files(request),
                request.prefill,
                request.num_tokens,
            ]
        )
        for request in requests
    }


def _kind(requests: Sequence[Request]) -> str:
    return "clip" if requests[0].videos else "picture"


def _media(request: Request) -> list[Media | Clip]:
    return [*request.images, *request.videos]


def _answerer(benchmark: _Benchmark, loaded: Deferred[Generator]) -> Generator:
    """What answers a benchmark: the model's words, or for a reward benchmark its rewards."""
    generator = loaded.value
    if not isinstance(benchmark, RewardPairs):
        return generator
    from mmalign.generate.local import LocalGenerator
    from mmalign.reward import RewardModel

    if not isinstance(generator, LocalGenerator):
        return generator
    model = RewardModel(generator.policy, name=generator.name, batch_size=generator.batch_size)
    return benchmark.answering(model)


def _files(request: Request) -> list[tuple[str | None, str | None]]:
    """Name and hash of each picture and clip: what is stated, or made of a picture's bytes."""
    found: list[tuple[str | None, str | None]] = []
    for one in _media(request):
        if not isinstance(one, Media):
            found.append((None, one.key))
        else:
            found.append((one.path, one.sha256 if one.bytes is None else media_key(one)))
    return found


def _items(suite: Suite) -> str:
    return f"items/{suite.key}.jsonl"


def _line(row: dict[str, Any]) -> str:
    # ASCII: an answer may hold U+2028, at which many readers would break the line.
    return json.dumps(row) + "\n"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
