"""Stored features of pictures: the same training to the bit, and never another tower's."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaModel

from mmalign.cli import run as command
from mmalign.config import dump_yaml
from mmalign.errors import ConfigError, TrainingError
from mmalign.models.load import load_policy
from mmalign.models.tiny import TinyModel, Tower
from mmalign.records import Media, Preference, user
from mmalign.store import open_dataset, write_dataset
from trainers import reference
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.estimate import estimate
from trainers.feature_key import check_frozen
from trainers.features import SHARD_PICTURES
from trainers.loop import train
from trainers.precompute import precompute
from trainers.setup import Parts, set_up

ROWS = 6
# Each row has a picture, and a contrast picture for the losses that read one.
PICTURES = 2 * ROWS


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call of the tower by the number of its pictures."""
    real, calls = LlavaModel.get_image_features, []

    def counted(self, pixel_values, **named):
        calls.append(len(pixel_values))
        return real(self, pixel_values, **named)

    monkeypatch.setattr(LlavaModel, "get_image_features", counted)
    return calls


@pytest.fixture
def stored(
    recipe, tiny_model: Path, tmp_path: Path, preference
) -> tuple[Callable[..., Recipe], Path, Path]:
    """A maker of recipes, with a model and a dataset of their own to change: their folders."""
    model, data = tmp_path / "checkpoint", tmp_path / "data"
    shutil.copytree(tiny_model, model)
    write_dataset(data, Preference, [preference(number) for number in range(ROWS)])
    made = []

    def make(**sections: Any) -> Recipe:
        made.append(1)
        values: dict[str, Any] = {
            "model": {"path": str(model)},
            "data": {"path": str(data)},
            "features": {"cap_gb": 1},
            "optim": {"micro_batch_size": 2, "steps": 3},
            "run": {"output": str(tmp_path / f"run-{len(made)}")},
        }
        for name, section in sections.items():
            nested = isinstance(section, dict) and "name" not in section
            values[name] = values.get(name, {}) | section if nested else section
        return recipe(**values)

    return make, model, data


def start(recipe: Recipe) -> Parts:
    """All that a run does before its first step."""
    run = RunDirectory(recipe)
    try:
        return set_up(recipe, open_dataset(recipe.data.path), run)
    finally:
        run.release()


def final(recipe: Recipe) -> bytes:
    for _ in train(recipe):
        pass
    return (recipe.run.output / "model" / "adapter_model.safetensors").read_bytes()


def files(data: Path) -> list[Path]:
    return sorted(data.glob("features/*/pictures-*.safetensors"))


@pytest.mark.parametrize(
    ("layout", "loss", "precision"),
    [
        ("padded", "sft", "float32"),
        ("shared_prefix", "dpo", "float32"),
        ("shared_prefix", "dpo", "bf16"),
    ],
)
def test_training_is_the_same_to_the_bit_with_stored_features(
    stored, encoded, layout: str, loss: str, precision: str
):
    """One picture in every micro-batch and one row of it, so that the tower sees it alone."""
    make, _, _ = stored
    sections: dict[str, Any] = {
        "scorer": {"layout": layout},
        "loss": {"name": loss},
        "optim": {"micro_batch_size": 1},
        "run": {"precision": precision},
    }
    without = final(make(features=None, **sections))
    first = final(make(**sections))
    before = len(encoded)
    assert final(make(**sections)) == first == without
    assert len(encoded) == before


def test_every_picture_is_encoded_once_and_by_no_later_run(stored, encoded, monkeypatch):
    make, _, data = stored
    start(make())
    # The first one is made once more, for the estimate.
    assert encoded == [1] * (PICTURES + 1)
    assert len(files(data)) == 1
    assert PICTURES < SHARD_PICTURES

    def called(self, *_, **__):
        raise AssertionError("the tower ran")

    monkeypatch.setattr(LlavaModel, "get_image_features", called)
    others: list[dict[str, Any]] = [
        {"run": {"seed": 5}, "optim": {"steps": 8}, "data": {"workers": 1, "cache_mb": 0}},
        {"loss": {"name": "rdpo_competitor"}, "reference": "cached"},
        {"loss": {"name": "sft"}},
        {"loss": {"name": "dpo_kl"}, "reference": "frozen_copy"},
        {"model": {"lora": None}},
    ]
    for other in others:
        for _ in train(make(**other)):
            pass


def test_rows_keep_no_pixels_of_stored_pictures(stored):
    make, _, _ = stored
    for parts in (start(make()), start(make())):
        rows = [parts.rows.prepared(row) for row in parts.survey.rows]
        media = [one for row in rows for c in row.conditions for one in c.images]
        assert len(media) == PICTURES
        assert not any(one.inputs for one in media)
        batch = next(parts.batches(first_step=0))
        assert batch.plan.images == {}
        assert len(batch.plan.features) == 4
        assert all(f.pooled.dtype == torch.float32 for f in batch.plan.features)


def test_features_are_stored_in_the_dtype_that_they_are_computed_in(stored):
    make, _, data = stored
    start(make(run={"precision": "bf16"}))
    assert {t.dtype for t in load_file(files(data)[0]).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["adapter_off", "frozen_copy", "cached"])
def test_every_reference_reads_the_same_features(stored, encoded, kind: str):
    """At the first step the policy is the reference: with another tower it would not be."""
    make, _, _ = stored
    parts = start(make(reference=kind))
    del encoded[:]
    batch = next(parts.batches(first_step=0))
    assert parts.reference is not None
    with torch.no_grad():
        assert torch.allclose(
            parts.reference(batch).logps, parts.scorer(batch.plan).logps, atol=1e-6
        )
    assert encoded == []


def test_a_reference_with_another_tower_is_refused(stored, monkeypatch):
    make, _, _ = stored

    def other(model):
        copied = copy.deepcopy(model)
        name = next(n for n, _ in copied.named_parameters() if "multi_modal_projector" in n)
        copied.get_parameter(name).data.view(-1)[0] += 1e-3
        return copied

    monkeypatch.setattr(reference, "copy", SimpleNamespace(deepcopy=other))
    with pytest.raises(AssertionError):
        start(make(reference="frozen_copy"))


@pytest.mark.parametrize("part", ["vision", "projector"])
def test_a_tower_that_trains_is_refused(stored, part: str):
    make, _, _ = stored
    with pytest.raises(ConfigError, match="features are stored of a tower and a projector that"):
        make(model={"train": {part: True}})


def test_an_adapter_of_the_tower_is_refused(stored, encoded):
    make, _, data = stored
    lora = {"rank": 2, "targets": r".*(vision_tower|language_model).*\.q_proj"}
    with pytest.raises(TrainingError, match=r"weights that train, such as .*vision_tower.*lora"):
        start(make(model={"lora": lora}))
    assert not encoded
    assert not (data / "features").exists()


def test_a_weight_between_tower_and_language_model_is_not_forgotten(tmp_path: Path, recipe):
    """LLaVA-NeXT's newline counts as language model, and trains with it."""
    path = TinyModel(
        output=str(tmp_path / "next"), family="llava_next", vision=Tower(), text=Tower()
    ).build()
    made = recipe(model={"path": str(path), "lora": None}, features={"cap_gb": 1})
    with pytest.raises(TrainingError, match=r"1 weights that train, such as .*image_newline"):
        check_frozen(load_policy(made.model))
    check_frozen(load_policy(recipe(model={"path": str(path)}).model))


def test_online_pairs_are_refused(stored):
    make, _, _ = stored
    online = {"source": {"name": "bdhs"}, "use": {"name": "replace"}}
    with pytest.raises(ConfigError, match=r"data\.online shows the policy pictures"):
        make(data={"online": online}, loss={"name": "dpo"})


def change_projector(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = next(n for n in weights if "multi_modal_projector" in n and n.endswith("weight"))
    weights[name].view(-1)[1] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        text = (model / name).read_text()
        assert text.count(old) == 1
        (model / name).write_text(text.replace(old, new))

    return change


def nothing(model: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "sections", "told"),
    [
        (change_projector, {}, r"weights of tower and projector was \"\w+\", is \"\w+\""),
        (
            replaced("processor_config.json", '"resample": 3', '"resample": 2'),
            {},
            r"image processor\.resample was 3, is 2",
        ),
        (nothing, {"model": {"max_pixels": 144}}, r"model\.max_pixels was null, is 144"),
        (nothing, {"run": {"precision": "bf16"}}, r"run\.precision was \"float32\", is \"bf16\""),
    ],
)
def test_what_changes_a_feature_makes_stored_ones_stale(stored, encoded, change, sections, told):
    make, model, _ = stored
    start(make())
    before = len(encoded)
    change(model)
    with pytest.raises(TrainingError, match=rf"features stored here are stale: {told}.*--fresh"):
        start(make(**sections))
    assert len(encoded) == before


def test_what_changes_no_feature_keeps_them(stored, encoded):
    make, model, _ = stored
    start(make())
    before = len(encoded)
    weights = load_file(model / "model.safetensors")
    weights[next(n for n in weights if "language_model" in n)].view(-1)[0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    start(make())
    assert len(encoded) == before


def test_a_replaced_picture_is_made_anew_and_no_other(stored, encoded, preference, tmp_path: Path):
    """It goes by its content, also where a row names it by a path."""
    make, _, _ = stored
    data = tmp_path / "by-path"
    (data / "media").mkdir(parents=True)
    rows = []
    for number in range(ROWS):
        row = preference(number)
        (data / "media" / f"{number}.png").write_bytes(row.images[0].bytes)
        its = (Media(path=f"{number}.png"),)
        rows.append(preference(number, images=its, contrast_images=()))
    write_dataset(data, Preference, rows)
    sections = {"data": {"path": str(data)}, "loss": {"name": "dpo"}}
    start(make(**sections))
    shutil.copy(data / "media" / "1.png", data / "media" / "4.png")
    start(make(**sections))
    assert len(encoded) == ROWS + 1
    (data / "media" / "4.png").write_bytes(preference(99).images[0].bytes)
    start(make(**sections))
    assert len(encoded) == ROWS + 1 + 2


def test_datasets_may_share_a_folder(stored, encoded, preference, tmp_path: Path):
    make, _, _ = stored
    shared = {"features": {"folder": str(tmp_path / "shared")}}
    start(make(**shared))
    other = tmp_path / "other"
    write_dataset(other, Preference, [preference(n, rejected="No.") for n in range(1, ROWS + 1)])
    del encoded[:]
    start(make(data={"path": str(other)}, **shared))
    # A row's two pictures, and one of them for the estimate.
    assert encoded == [1] * 3


def test_beyond_the_cap_nothing_is_made(stored, encoded, caplog):
    make, _, data = stored
    # 4 tokens of 32 numbers in float32.
    each = 4 * 32 * 4
    cap = each * PICTURES / 1e9
    with pytest.raises(TrainingError) as error:
        start(make(features={"cap_gb": cap * 0.99}))
    told = str(error.value)
    assert f"12 pictures of {each / 1e6:.3g} MB" in told
    assert "at most features.cap_gb=6.08" in told
    assert "Raise features.cap_gb" in told
    assert encoded == [1]
    assert not files(data)
    with caplog.at_level("INFO", logger="mmalign"):
        start(make(features={"cap_gb": cap * 1.001}))
    assert f"12 of 12 pictures to be made, {each / 1e6:.3g} MB each" in caplog.text
    assert sum(tensor.nbytes for tensor in load_file(files(data)[0]).values()) == each * PICTURES
    # What is stored already is read under any cap.
    start(make(features={"cap_gb": 1e-9}))


def test_the_estimate_says_what_features_would_take(stored):
    make, _, _ = stored
    told = estimate(make())
    # A picture and a contrast picture a row.
    assert "(8 image tokens a row x 128 bytes x 6 rows); cap 1 GB" in told
    assert "at most 6.14e-06 GB on disk" in told
    assert "vision features" not in estimate(make(features=None))


def test_a_stopped_pass_goes_on_and_gives_the_same_files(stored, monkeypatch):
    make, _, data = stored
    monkeypatch.setattr("trainers.features.SHARD_PICTURES", 4)
    real, calls = LlavaModel.get_image_features, []

    def stops(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self, *arguments, **named)

    monkeypatch.setattr(LlavaModel, "get_image_features", stops)
    with pytest.raises(KeyboardInterrupt):
        start(make())
    assert len(files(data)) == 1
    before = files(data)[0].read_bytes()
    start(make())
    # The estimate, and the eight that were missing.
    assert len(calls) == 7 + 1 + 8
    found = {file.name: file.read_bytes() for file in files(data)}
    assert len(found) == 3
    assert before in found.values()
    shutil.rmtree(data / "features")
    start(make(data={"workers": 1}))
    assert {file.name: file.read_bytes() for file in files(data)} == found


def test_a_file_cut_short_is_made_again(stored, encoded, caplog, monkeypatch):
    make, _, data = stored
    monkeypatch.setattr("trainers.features.SHARD_PICTURES", 4)
    start(make())
    file = files(data)[1]
    good = file.read_bytes()
    file.write_bytes(good[:-5])
    del encoded[:]
    start(make())
    assert len(encoded) == 1 + 4
    assert "is damaged" in caplog.text
    made = [load_file(one) for one in files(data)]
    assert sum(map(len, made)) == PICTURES


def test_a_run_that_goes_on_reads_them_and_does_not_change_over(stored, encoded):
    make, _, data = stored
    whole = final(make(run={"save_every_steps": 1}))
    half = make(run={"save_every_steps": 1})
    for step, _ in enumerate(train(half)):
        if step == 1:
            break
    with pytest.raises(TrainingError, match="the recipe changed since this run began"):
        final(half.model_copy(update={"features": None}))
    # Even after their folder was lost.
    shutil.rmtree(data / "features")
    del encoded[:]
    assert final(half) == whole
    assert encoded == [1] * (PICTURES + 1)


def test_precompute_fills_both_and_fresh_clears_both(stored, encoded, tmp_path: Path, capsys):
    make, _, data = stored
    recipe = make()
    folder = precompute(recipe)
    assert folder == next((data / "reference").iterdir())
    before = files(data)
    assert len(before) == 1
    del encoded[:]
    precompute(recipe)
    assert encoded == []
    precompute(recipe, fresh=True)
    assert encoded == [1] * (PICTURES + 1)
    assert files(data) == before
    # For a loss that compares with nothing, the features alone.
    alone = make(loss={"name": "sft"})
    file = tmp_path / "sft.yaml"
    file.write_text(dump_yaml(alone))
    assert command(["precompute", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(before[0].parent)


def test_rows_without_pictures_need_no_features(stored, encoded, tmp_path: Path, preference):
    make, _, _ = stored
    data = tmp_path / "text"
    rows = [
        preference(n, prompt=user(f"What is {n}?"), images=(), contrast_images=())
        for n in range(ROWS)
    ]
    write_dataset(data, Preference, rows)
    final(make(data={"path": str(data)}, loss={"name": "dpo"}))
    assert encoded == []
