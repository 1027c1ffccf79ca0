"""RRPO's builder with real models, small ones: from clips to rows that a trainer takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_builders.base import GeneratorConfig, OverlapFilter
from data_builders.config import load_builder
from data_builders.rrpo_video import RRPOVideo
from data_builders.verify import Differs, load_verifier
from mmalign.clips import ClipReader, FrameSampling, open_clip
from mmalign.generate.base import Generation
from mmalign.generate.local import LocalGenerator
from mmalign.losses.rrpo import RRPO
from mmalign.models.load import ModelConfig
from mmalign.models.tiny import TinyModel
from mmalign.records import Example, Media, Preference, user
from mmalign.store import open_dataset, write_dataset
from trainers.objectives.pair import PairObjective

PATCH = {"qwen25vl": 4, "llava_onevision": 8}
WORDS = ("What", "happens?", "a", "red", "blue", "ball", "box", "rolls", "falls")
FRAMES = FrameSampling(num_frames=4)


class Denies:
    """A policy that says no."""

    name = "denies"

    def generate(self, requests, sampling) -> list[Generation]:
        return [Generation(id=r.id, text="No.", num_tokens=1, finished=True) for r in requests]


class InProcess:
    """Opens clips without a child process."""

    def open(self, media, root):
        return open_clip(media, root, FRAMES)


@pytest.fixture(params=PATCH)
def config(request, tmp_path: Path, write_clip) -> RRPOVideo:
    """The builder on four clips, one of them broken, with a model that ends what it says."""
    model = TinyModel(
        output=str(tmp_path / "model"),
        family=request.param,
        patch_size=PATCH[request.param],
        words=WORDS,
    ).build()
    prompt = user("What happens?", videos=1)
    examples = [
        Example(
            id=name,
            prompt=prompt,
            videos=(write_clip(tmp_path / f"{name}.mkv", ord(name)),),
            answer="a red ball rolls",
        )
        for name in "abcd"
    ]
    (tmp_path / "b.mkv").write_bytes(b"broken")
    write_dataset(tmp_path / "in", Example, examples, media_root=str(tmp_path))
    return RRPOVideo(
        source=tmp_path / "in",
        output=tmp_path / "out",
        generator=GeneratorConfig(
            model=ModelConfig(path=str(model), frames=FRAMES), max_new_tokens=40, batch_size=2
        ),
        verify=Differs(similarity=OverlapFilter(threshold=0.9)),
        tries=8,
        seed=1,
    )


@pytest.mark.slow
def test_from_clips_to_rows_that_a_trainer_takes(config: RRPOVideo) -> None:
    dataset = open_dataset(config.build(), Preference)
    assert dataset.manifest.counts["quarantined:unreadable"] == 1
    assert [pair.id for pair in dataset] == ["a", "c", "d"]
    # Again with the same seed, other chunks and other neighbours in a batch.
    again = config.model_copy(update={"output": config.output / "../again", "shard_rows": 1})
    generator = LocalGenerator.from_checkpoint(config.generator.model, batch_size=1)
    again.build_with(generator, InProcess(), load_verifier(config.verify, None), None)
    assert list(open_dataset(again.output, Preference)) == list(dataset)
    preparer = generator.policy.preparer
    objective = PairObjective(preparer, dataset.media_root, needs=RRPO().needs)
    for pair in dataset:
        prepared = objective.prepare(pair)
        assert any(any(candidate.marked or ()) for candidate in prepared.candidates)
        assert prepared.conditions[0].num_media_tokens > 0


@pytest.mark.real
def test_real_clips_are_spoilt_and_drawn(real: Path, tmp_path: Path) -> None:
    files = sorted(file.name for file in (real / "videos").iterdir())
    examples = [
        Example(id=name, prompt=user("Is it?", videos=1), videos=(Media(path=name),), answer="Yes.")
        for name in files
    ]
    write_dataset(tmp_path / "in", Example, examples, media_root=str(real / "videos"))
    generator = GeneratorConfig(model=ModelConfig(path="none", frames=FRAMES), batch_size=2)
    config = RRPOVideo(source=tmp_path / "in", output=tmp_path / "out", generator=generator)
    with ClipReader(sampling=FRAMES, timeout_seconds=200) as reader:
        config.build_with(Denies(), reader, load_verifier(config.verify, None), None)
    assert len(open_dataset(config.output)) == len(files)
    page = (config.output / "preview.html").read_text()
    assert page.count('<figure class="strip">') == 2 * len(files)


def test_the_shipped_configs_are_read(repo_root: Path) -> None:
    files = sorted((repo_root / "configs/build").glob("rrpo_*.yaml"))
    assert files
    assert all(isinstance(load_builder(file), RRPOVideo) for file in files)
