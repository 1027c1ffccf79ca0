"""Ask a model what has not been answered yet, and keep each answer as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from evals.answer_files import (
    ANSWERS,
    RESULTS,
    Answer,
    appending,
    line_of,
    read_answers,
    write_model,
)
from evals.base import Benchmark, digest
from evals.benchmarks.verifiable import VerifiableBench
from evals.config import EvalModel, EvalRecipe
from evals.judged import JudgedBench
from evals.reward_pairs import RewardPairs
from mmalign import log
from mmalign.clips import Clip
from mmalign.engines import Deferred
from mmalign.errors import ConfigError, DataError, MediaError, MmalignError, ModelError
from mmalign.generate.base import Generation, Generator, Request, Sampling
from mmalign.generate.server import Unanswered, with_ledger
from mmalign.media import media_key
from mmalign.records import Media

# Batches generated between two writes: a kill loses no more than these, of each worker.
_BATCHES = 4
# So many unanswered questions are told of one by one.
_TOLD = 5
# Some requests to one benchmark, by its place in the recipe.
_Chunk = tuple[int, list[Request]]
# Most benchmarks score texts; whether a response has a form hangs on more than its text, and some
# need a judge's word.
AnyBench = Benchmark | VerifiableBench | JudgedBench
Asked = tuple[AnyBench, list[Request]]
# A request's id with its answer, or why there is none.
_Reply = tuple[str, Generation | MmalignError]
_logger = log.get_logger("evals")


def asked_by(recipe: EvalRecipe) -> list[Asked]:
    """All that a recipe asks. Raises DataError where the folder of its pictures is not there."""
    asked: list[Asked] = [(benchmark, benchmark.requests()) for benchmark in recipe.benchmarks]
    for benchmark, requests in asked:
        by_path = next((one for one in requests if _names_in_folder(one)), None)
        if by_path is not None and not (by_path.media_root and by_path.media_root.is_dir()):
            raise DataError(
                f"the folder of {kind_of(requests)}s does not exist",
                where=benchmark.key,
                got=by_path.media_root,
            )
    return asked


def check_files(asked: Sequence[Asked]) -> None:
    """Say which pictures and clips are missing, before a model is loaded for the others.

    Raises DataError where all of a benchmark's are.
    """
    for benchmark, requests in asked:
        files = dict.fromkeys(
            (request.media_root or Path()) / name
            for request in requests
            for name in _names_in_folder(request)
        )
        missing = [file for file in files if not file.exists()]
        told = f"{len(missing)} of {len(files)} {kind_of(requests)}s are missing, such as"
        if missing and len(missing) == len(files):
            raise DataError(
                f"{told} {missing[0]}", where=benchmark.key, fix="correct the path of their folder"
            )
        if missing:
            _logger.warning(
                "%s: %s %s; their questions stay unanswered", benchmark.key, told, missing[0]
            )


def answer(
    recipe: EvalRecipe, asked: Sequence[Asked], generator: Generator | None = None
) -> tuple[dict[str, str], dict[str, Answer]]:
    """Answer what is asked and not answered yet, into the recipe's output.

    Returns the model's name and fingerprint, and all answers that are there, by key.
    """
    loaded = Deferred(partial(_load, recipe) if generator is None else lambda: generator)
    with recipe.engine.open():
        name = recipe.engine.call(lambda: loaded.value.name)
        fingerprint = fingerprint_of(name, recipe)
        model = {"name": name, "fingerprint": fingerprint}
        with _alone(recipe.output):
            write_model(recipe.output, model)
            answers = read_answers(recipe.output)
            try:
                _ask(recipe, loaded, asked, fingerprint, answers)
            except KeyboardInterrupt:
                _logger.warning(
                    "stopped: the answers so far are kept in %s, and the same command goes on",
                    recipe.output,
                )
                raise
    return model, answers


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Raise DataError while another run answers into the folder: both would ask everything."""
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".answering.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(
            "another run is answering into this folder",
            where=str(output),
            fix="wait for it, or give this one an output of its own",
        ) from None
    try:
        yield
    finally:
        lock.release()


def fingerprint_of(name: str, recipe: EvalRecipe) -> str:
    """What tells a model's answers from another's: its name, and how it was loaded."""
    return digest([name, recipe.model.model_dump(mode="json")])


def _ask(
    recipe: EvalRecipe,
    loaded: Deferred[Generator],
    asked: Sequence[Asked],
    fingerprint: str,
    answers: dict[str, Answer],
) -> None:
    """Generate the answers that are not there yet, and append each chunk's when it comes."""
    keys = [keys_of(benchmark, requests, fingerprint) for benchmark, requests in asked]
    done = {key for key, answer in answers.items() if answer.text is not None}
    size = _BATCHES * recipe.batch_size
    chunks: list[_Chunk] = []
    for number, (_, requests) in enumerate(asked):
        left = [request for request in requests if keys[number][request.id] not in done]
        chunks += [(number, left[i : i + size]) for i in range(0, len(left), size)]
    if chunks:
        # From here on the results are not those of this folder's answers.
        (recipe.output / RESULTS).unlink(missing_ok=True)

    def told(chunk: _Chunk) -> str:
        number, requests = chunk
        where = f"{asked[number][0].key} stopped at {requests[0].id} … {requests[-1].id}"
        return f"{where}; the answers so far are kept in {recipe.output}"

    answering = _Answering(
        [Deferred(partial(_answerer, benchmark, loaded)) for benchmark, _ in asked],
        [_sampling(benchmark) for benchmark, _ in asked],
    )
    arriving, unanswered = recipe.engine.run(answering, chunks, told), 0
    with appending(recipe.output / ANSWERS) as file:
        for number, replies in log.progress(arriving, label=recipe.name, total=len(chunks)):
            for id, made in replies:
                if isinstance(made, MmalignError):
                    unanswered += 1
                    if unanswered <= _TOLD:
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
    if unanswered > _TOLD:
        _logger.warning("%d more stay unanswered", unanswered - _TOLD)


@dataclasses.dataclass(frozen=True)
class _Answering:
    """Answers a chunk in whichever process; each of the two has an item for each benchmark."""

    answerers: list[Deferred[Generator]]
    samplings: list[Sampling]

    def __call__(self, chunk: _Chunk) -> tuple[int, list[_Reply]]:
        number, requests = chunk
        generator = self.answerers[number].value
        return number, list(_generate(generator, requests, self.samplings[number]))


def _sampling(benchmark: AnyBench) -> Sampling:
    if isinstance(benchmark, VerifiableBench):
        return benchmark.sampling()
    return Sampling(max_new_tokens=benchmark.max_new_tokens)


def keys_of(benchmark: AnyBench, requests: Sequence[Request], fingerprint: str) -> dict[str, str]:
    """Request id to a key that changes with whatever may change the answer.

    Media count by name and hash: the folder may move, its files should not change.
    """
    decoding = dataclasses.asdict(_sampling(benchmark))
    return {
        request.id: digest(
            [
                fingerprint,
                benchmark.key,
                decoding,
                request.id,
                [dataclasses.asdict(message) for message in request.prompt],
                files_of(request),
                request.prefill,
                request.num_tokens,
            ]
        )
        for request in requests
    }


def _load(recipe: EvalRecipe) -> Generator:
    if not isinstance(recipe.model, EvalModel):
        return with_ledger(recipe.model, recipe.output / "server.jsonl").load()
    from mmalign.generate.local import LocalGenerator
    from mmalign.models.load import ModelConfig

    config = ModelConfig(**recipe.model.model_dump())
    return LocalGenerator.from_checkpoint(config, batch_size=recipe.batch_size)


def _generate(
    generator: Generator, requests: Sequence[Request], sampling: Sampling
) -> Iterator[_Reply]:
    """Each request with its answer, or why it has none: an unreadable picture, a server's silence.

    A chunk that holds such a picture is halved until the picture is alone.
    """
    try:
        made: Sequence[Generation | None] = generator.generate(requests, sampling)
    except MediaError as error:
        if len(requests) == 1:
            yield requests[0].id, error
            return
        middle = len(requests) // 2
        yield from _generate(generator, requests[:middle], sampling)
        yield from _generate(generator, requests[middle:], sampling)
        return
    except Unanswered as error:
        silent = [
            ModelError(reason or "no answer", where=generator.name) for reason in error.reasons
        ]
        both = zip(requests, error.generations, silent, strict=True)
        yield from ((request.id, one or why) for request, one, why in both)
        return
    if [answer.id if answer else None for answer in made] != [request.id for request in requests]:
        raise ModelError("did not answer each request once, in order", where=generator.name)
    yield from ((answer.id, answer) for answer in made if answer is not None)


def _answerer(benchmark: AnyBench, loaded: Deferred[Generator]) -> Generator:
    """What answers a benchmark: the model's words, or for a reward benchmark its rewards."""
    generator = loaded.value
    if not isinstance(benchmark, RewardPairs):
        return generator
    from mmalign.generate.local import LocalGenerator
    from mmalign.generate.server import ServerGenerator
    from mmalign.reward import RewardModel

    if isinstance(generator, ServerGenerator):
        raise ConfigError(
            "is for reward models, which no chat server serves",
            where=benchmark.key,
            fix="name the checkpoint: model.path",
        )
    if not isinstance(generator, LocalGenerator):
        return generator
    model = RewardModel(generator.policy, name=generator.name, batch_size=generator.batch_size)
    return benchmark.answering(model)


def kind_of(requests: Sequence[Request]) -> str:
    """What the requests are about, in a word."""
    return "clip" if requests[0].videos else "picture"


def _media(request: Request) -> list[Media | Clip]:
    return [*request.images, *request.videos]


def _names_in_folder(request: Request) -> list[str]:
    """The files that a request needs from its folder."""
    media = [one for one in _media(request) if isinstance(one, Media) and one.bytes is None]
    return [one.path for one in media if one.path is not None]


def files_of(request: Request) -> list[tuple[str | None, str | None]]:
    """Name and hash of each picture and clip: what is stated, or made of a picture's bytes."""
    found: list[tuple[str | None, str | None]] = []
    for one in _media(request):
        if not isinstance(one, Media):
            found.append((None, one.key))
        else:
            found.append((one.path, one.sha256 if one.bytes is None else media_key(one)))
    return found
