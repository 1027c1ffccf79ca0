"""Re-Align: every accepted pair satisfies the paper's rules, whatever the pictures are like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_builders.base import GeneratorConfig, OverlapFilter, PictureFolder
from data_builders.completion import InfillCompleter
from data_builders.gallery import OpenClip, PolicyVision, make_gallery
from data_builders.masking import MASK, RuleMasker
from data_builders.realign import ReAlign
from mmalign.errors import DataError
from mmalign.generate.base import Generation, Sampling
from mmalign.media import embed
from mmalign.models.load import ModelConfig
from mmalign.records import Example, Media, Preference, user
from mmalign.similarity import TokenOverlap
from mmalign.store import Dataset, Manifest, open_dataset, write_dataset

REAL = Path(__file__).parents[3] / "shared" / "real" / "images"


class Namer:
    """Sees nothing but file names: a gap is filled with what the picture's name says."""

    name = "namer"

    def __init__(self, says: dict[str, str] | None = None) -> None:
        self.says = says or {}

    def generate(self, requests, sampling: Sampling) -> list[Generation]:
        made = []
        for request in requests:
            (image,) = request.images
            path = image.path or ""
            text = self.says.get(path, Path(path).stem.partition("_")[2])
            made.append(Generation(id=request.id, text=text, num_tokens=1, finished=True))
        return made

    def count_tokens(self, text: str) -> int:
        return len(text.split())


class Redness:
    """A picture's angle on the quarter circle is how red it is: nearest in red is nearest."""

    name = "redness"

    def encode(self, images: list[Image.Image]) -> np.ndarray:
        angle = np.array([image.getpixel((0, 0))[0] for image in images]) / 255 * np.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def paint(folder: Path, reds: dict[str, int]) -> Path:
    for name, red in reds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (red, 10, 20)).save(folder / name)
    return folder


def config(source: PictureFolder | Path, output: Path, **changes) -> ReAlign:
    settings = {
        "source": source,
        "output": output,
        "generator": GeneratorConfig(model=ModelConfig(path="none")),
        "masker": RuleMasker(),
        "encoder": PolicyVision(),
        "completer": InfillCompleter(),
        "similarity": OverlapFilter(threshold=0.95),
        "near_duplicate": 0.9999,
        "shard_rows": 4,
    }
    return ReAlign(**(settings | changes))


def build(settings: ReAlign, generator: Namer | None = None) -> Dataset[Preference]:
    settings.build_with(generator or Namer(), Redness(), TokenOverlap())
    return open_dataset(settings.output, Preference)


@pytest.fixture
def pictures(tmp_path: Path) -> PictureFolder:
    """Twelve pictures from dark to red, each of its own name."""
    reds = {f"{i:02d}_thing{i:02d}.png": 20 * i for i in range(12)}
    return PictureFolder(images=paint(tmp_path / "pictures", reds))


def test_every_accepted_pair_keeps_the_papers_rules(
    pictures: PictureFolder, tmp_path: Path
) -> None:
    dataset = build(config(pictures, tmp_path / "out"))
    overlap = TokenOverlap()
    assert len(dataset) == 12
    for pair in dataset:
        ((own,), (contrast,)) = pair.images, pair.contrast_images
        assert contrast.path != own.path
        assert overlap([pair.chosen], [pair.rejected])[0] < 0.95
        assert MASK not in pair.rejected
        seen = Path(contrast.path or "").stem.partition("_")[2]
        assert pair.rejected == f"a photo of a {seen}.", "the response comes from this picture"
        assert own.sha256 not in (None, contrast.sha256)
        detail = json.loads(pair.origin.detail)
        assert pair.origin.reason == "accepted:rank1"
        assert detail["masked"] == f"a photo of a {MASK}."
        assert detail["neighbour"] == contrast.path
        assert detail["similarity"] == pytest.approx(0.8)
    assert {p.id: p.contrast_images[0].path for p in dataset}["00_thing00.png"] == "01_thing01.png"


def test_spans_are_the_phrases_that_differ(pictures: PictureFolder, tmp_path: Path) -> None:
    for pair in build(config(pictures, tmp_path / "out")):
        (ours,), (theirs,) = pair.chosen_spans, pair.rejected_spans
        assert ours.phrase == theirs.phrase
        assert pair.chosen[ours.start : ours.end] == Path(pair.id).stem.partition("_")[2]
        assert pair.rejected[: theirs.start] == "a photo of a "
        assert pair.rejected[theirs.end :] == "."


def test_the_first_picture_whose_response_differs_is_taken(tmp_path: Path) -> None:
    """Row 0's neighbours are 1, 2, 3; in view of 1 and 2 the model says what row 0 says."""
    names = ["0_dog.png", "1_b.png", "2_c.png", "3_d.png"]
    folder = paint(tmp_path / "p", {name: 40 * i for i, name in enumerate(names)})
    says = {"0_dog.png": "ant", "1_b.png": "dog", "2_c.png": "Dog", "3_d.png": "fox"}
    dataset = build(config(PictureFolder(images=folder), tmp_path / "out"), Namer(says))
    first = dataset[0]
    assert first.id == "0_dog.png"
    assert first.rejected == "a photo of a fox."
    assert first.contrast_images[0].path == "3_d.png"
    assert first.origin.reason == "accepted:rank3"
    assert json.loads(first.origin.detail)["tried"] == ["similarity 1.0000"] * 2

    two = config(PictureFolder(images=folder), tmp_path / "two", k=2)
    assert build(two, Namer(says)).manifest.counts["dropped:no_neighbour_accepted"] == 1


def test_similarity_equal_to_the_threshold_is_alike(tmp_path: Path) -> None:
    """Four of five words are shared: F1 is 0.8 exactly."""
    folder = PictureFolder(images=paint(tmp_path / "p", {"0_dog.png": 0, "1_cat.png": 100}))
    at = build(config(folder, tmp_path / "at", similarity=OverlapFilter(threshold=0.8)))
    above = build(config(folder, tmp_path / "above", similarity=OverlapFilter(threshold=0.81)))
    assert at.manifest.counts == {"dropped:no_neighbour_accepted": 2}
    assert above.manifest.counts == {"accepted:rank1": 2}


def test_lowering_the_threshold_never_accepts_more(pictures: PictureFolder, tmp_path: Path) -> None:
    """Names share more or fewer words, so that every threshold cuts somewhere else."""
    says = {f"{i:02d}_thing{i:02d}.png": "a photo of a " * (i % 5) + "x" for i in range(12)}
    kept = []
    for threshold in (1.0, 0.75, 0.6, 0.5, 0.3):
        similarity = OverlapFilter(threshold=threshold)
        settings = config(pictures, tmp_path / f"{threshold}", k=2, similarity=similarity)
        kept.append(len(build(settings, Namer(says))))
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 12
    assert kept[-1] < kept[0]


def test_a_leftover_mask_is_never_accepted(pictures: PictureFolder, tmp_path: Path) -> None:
    says = {f"{i:02d}_thing{i:02d}.png": MASK for i in range(12)}
    dataset = build(config(pictures, tmp_path / "out"), Namer(says))
    assert dataset.manifest.counts == {"dropped:no_neighbour_accepted": 12}


def test_copies_and_near_duplicates_are_no_neighbours(tmp_path: Path) -> None:
    reds = {"0_dog.png": 0, "1_near.png": 1, "2_far.png": 200}
    folder = paint(tmp_path / "p", reds)
    shutil.copy(folder / "0_dog.png", folder / "3_copy.png")
    dataset = build(config(PictureFolder(images=folder), tmp_path / "out", near_duplicate=0.999))
    contrast = {pair.id: pair.contrast_images[0].path for pair in dataset}
    assert contrast["0_dog.png"] == contrast["1_near.png"] == contrast["3_copy.png"] == "2_far.png"

    dataset = build(config(PictureFolder(images=folder), tmp_path / "all", near_duplicate=1.0))
    contrast = {pair.id: pair.contrast_images[0].path for pair in dataset}
    assert contrast["0_dog.png"] == contrast["3_copy.png"] == "1_near.png"


def test_unreadable_pictures_are_quarantined_while_the_job_goes_on(
    pictures: PictureFolder, tmp_path: Path
) -> None:
    broken = {
        "20_torn.png": (pictures.images / "03_thing03.png").read_bytes()[:40],
        "21_empty.jpg": b"",
        "22_text.png": b"this is no picture",
    }
    for name, data in broken.items():
        (pictures.images / name).write_bytes(data)
    dataset = build(config(pictures, tmp_path / "out"))
    assert dataset.manifest.counts == {"accepted:rank1": 12, "quarantined:unreadable": 3}
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == sorted(broken)
    assert "0 bytes" in lines[1]
    assert not {pair.contrast_images[0].path for pair in dataset} & broken.keys()


def test_what_cannot_be_used_is_dropped_with_the_reason(tmp_path: Path) -> None:
    folder = paint(tmp_path / "media", {"a.png": 0, "b_cat.png": 100})
    a, b = Media(path="a.png"), Media(path="b_cat.png")
    prompt = user("What?", images=1)
    rows = [
        Example(id="1", prompt=prompt, images=(a,), answer=None),
        Example(id="2", prompt=user("What?", images=2), images=(a, b), answer="a dog"),
        Example(id="3", prompt=prompt, images=(a,), answer="Yes."),
        Example(id="4", prompt=prompt, images=(a,), answer="a dog"),
        Example(id="5", prompt=prompt, images=(Media(path="../etc"),), answer="a dog"),
        Example(id="6", prompt=user("What?"), answer="a dog"),
    ]
    write_dataset(tmp_path / "in", Example, rows, media_root=str(folder))
    dataset = build(config(tmp_path / "in", tmp_path / "out"))
    assert dataset.manifest.counts == {
        "accepted:rank1": 1,
        "dropped:no_answer": 1,
        "dropped:not_one_image": 2,
        "dropped:nothing_to_mask": 1,
        "quarantined:unreadable": 1,
    }
    assert dataset[0].rejected == "a cat"
    assert dataset[0].prompt == prompt


@pytest.mark.parametrize(("num", "counts"), [(0, {}), (1, {"dropped:no_neighbour": 1})])
def test_too_few_pictures_make_an_empty_dataset(tmp_path: Path, num: int, counts: dict) -> None:
    folder = paint(tmp_path / "p", {f"{i}_cat.png": i for i in range(num)})
    folder.mkdir(exist_ok=True)
    dataset = build(config(PictureFolder(images=folder), tmp_path / "out"))
    assert len(dataset) == 0
    assert dataset.manifest.counts == counts
    assert (tmp_path / "out/preview.html").exists()


def test_sharding_changes_nothing(pictures: PictureFolder, tmp_path: Path) -> None:
    whole = build(config(pictures, tmp_path / "whole"))
    config(pictures, tmp_path / "parts", shard="1/2").build_with(Namer(), Redness(), TokenOverlap())
    with pytest.raises(DataError, match="no manifest"):
        open_dataset(tmp_path / "parts")
    parts = build(config(pictures, tmp_path / "parts", shard="0/2"))
    assert parts.manifest == whole.manifest
    other_cut = build(config(pictures, tmp_path / "cut", shard_rows=100))
    assert list(other_cut) == list(whole)


def test_the_manifest_says_what_made_the_pairs(pictures: PictureFolder, tmp_path: Path) -> None:
    manifest: Manifest = build(config(pictures, tmp_path / "out", seed=7, limit=5)).manifest
    assert sum(manifest.counts.values()) == 5
    assert manifest.seed == 7
    assert manifest.model == {
        "generator": "namer",
        "encoder": "redness",
        "similarity": "token_overlap",
        "masker": "rule",
        "completer": "infill",
    }
    assert manifest.config["k"] == 10
    assert manifest.config["similarity"]["threshold"] == 0.95


def test_embedded_media_make_a_dataset_that_can_move(
    pictures: PictureFolder, tmp_path: Path
) -> None:
    build(config(pictures, tmp_path / "out", embed_media=True))
    original = (pictures.images / "00_thing00.png").read_bytes()
    shutil.rmtree(pictures.images)
    (tmp_path / "out").rename(tmp_path / "moved")
    pair = open_dataset(tmp_path / "moved", Preference)[0]
    assert pair.images[0].bytes == original
    assert pair.contrast_images[0].bytes not in (None, original)


def test_the_preview_shows_both_pictures_and_the_difference(
    pictures: PictureFolder, tmp_path: Path
) -> None:
    build(config(pictures, tmp_path / "out"))
    html = (tmp_path / "out/preview.html").read_text()
    assert html.count("data:image/") == 24
    assert "accepted:rank1, similarity 0.8" in html
    assert f"a photo of a {MASK}." in html


def test_the_gallery_opens_a_shared_picture_once(tmp_path: Path) -> None:
    folder = paint(tmp_path / "media", {"a.png": 0, "b.png": 100})
    seen: list[int] = []

    class Counting(Redness):
        def encode(self, images: list[Image.Image]) -> np.ndarray:
            seen.append(len(images))
            return super().encode(images)

    rows = [
        Example(id=f"{i}", prompt=user("?", images=1), images=(Media(path=f"{'ab'[i % 2]}.png"),))
        for i in range(6)
    ]
    write_dataset(tmp_path / "in", Example, rows, media_root=str(folder))
    source = config(tmp_path / "in", tmp_path / "out").load_source()
    gallery = make_gallery(source, Counting(), 10, near_duplicate=0.99, index="exact")
    assert seen == [2]
    assert [[n.index for n in line] for line in gallery.near] == [[1], [0]]


def test_names_of_files_become_answers(tmp_path: Path) -> None:
    reds = {"n01440764_tench.png": 0, "n01443537_tree_frog.png": 9, "sub/plain.JPG": 8}
    folder = PictureFolder(images=paint(tmp_path / "p", reds), answer_template="{name}!")
    found = [(example.id, example.answer) for example in folder.examples()]
    assert found == [
        ("n01440764_tench.png", "tench!"),
        ("n01443537_tree_frog.png", "tree frog!"),
        ("sub/plain.JPG", "plain!"),
    ]
    with pytest.raises(ValueError, match="the only field is"):
        PictureFolder(images=tmp_path, answer_template="{nam}")
    with pytest.raises(DataError, match="no such folder"):
        PictureFolder(images=tmp_path / "none").examples()


def test_random_retrieval_weights_must_be_written_out() -> None:
    with pytest.raises(ValueError, match="pretrained"):
        OpenClip(model="RN50")  # type: ignore[call-arg]
    assert OpenClip(model="RN50", pretrained=None).pretrained is None


@pytest.mark.parametrize("shard", ["3/3", "x", "1", "-1/2", "1/0"])
def test_impossible_shards_are_refused(tmp_path: Path, shard: str) -> None:
    with pytest.raises(ValueError, match="wanted i/n"):
        config(tmp_path, tmp_path / "out", shard=shard)


def test_another_config_in_the_same_directory_is_named(
    pictures: PictureFolder, tmp_path: Path
) -> None:
    build(config(pictures, tmp_path / "out"))
    with pytest.raises(DataError, match=r"config\.k was 10, is 3"):
        build(config(pictures, tmp_path / "out", k=3))


def test_pictures_inside_the_rows_are_told_apart_by_their_hash(tmp_path: Path) -> None:
    images = [embed(Image.new("RGB", (8, 8), (60 * i, 0, 0))) for i in range(3)]
    rows = [
        Example(id=f"{i}", prompt=user("?", images=1), images=(image,), answer=f"thing {i}")
        for i, image in enumerate([*images, images[0]])
    ]
    write_dataset(tmp_path / "in", Example, rows)
    dataset = build(config(tmp_path / "in", tmp_path / "out"), Namer({"": "other"}))
    contrast = [pair.contrast_images[0] for pair in dataset]
    assert contrast[0] == contrast[3] == images[1]
    assert contrast[0].bytes is not None


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/real/images: 125 photographs")
def test_photographs_of_all_sizes_and_modes_go_through(tmp_path: Path) -> None:
    """Random weights say nothing sensible; every photograph must still come out as a pair."""
    from mmalign.models.tiny import TinyModel

    small_clip = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1},
    }
    small_clip["vision_cfg"]["patch_size"] = 16
    (tmp_path / "small-clip-for-photographs.json").write_text(json.dumps(small_clip))
    model = ModelConfig(path=str(TinyModel(output=str(tmp_path / "base")).build()))
    settings = config(
        PictureFolder(images=REAL),
        tmp_path / "out",
        generator=GeneratorConfig(model=model, batch_size=32),
        encoder=OpenClip(model=str(tmp_path / "small-clip-for-photographs.json"), pretrained=None),
        shard_rows=64,
        # Random features of photographs are all alike; only copies may be left out here.
        near_duplicate=0.999999,
    )
    settings.build()
    dataset = open_dataset(settings.output, Preference)
    counts = dataset.manifest.counts
    assert sum(counts.values()) == len(list(REAL.glob("*.jpg")))
    assert len(dataset) >= 0.9 * sum(counts.values())
    assert not any(reason.startswith("quarantined") for reason in counts)
    for pair in dataset:
        assert MASK not in pair.rejected
        assert pair.contrast_images[0].sha256 != pair.images[0].sha256
        assert json.loads(pair.origin.detail)["similarity"] < 0.95
    assert (settings.output / "preview.html").stat().st_size > 100_000
