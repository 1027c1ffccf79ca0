"""Stored reference scores: read by every run that they are right for, refused to any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmalign.cli import run as command
from mmalign.config import dump_yaml
from mmalign.errors import ConfigError, TrainingError
from mmalign.models.load import Lora, ModelConfig, TrainParts, load_policy
from mmalign.records import Media, Preference
from mmalign.scoring.scorer import Scorer
from mmalign.store import content_hash, open_dataset, write_dataset
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.keyed_folder import KEY
from trainers.loop import train
from trainers.objectives.pair import PairObjective
from trainers.precompute import precompute
from trainers.reference_cache import Cached
from trainers.reference_key import weights_hash
from trainers.reference_store import ReferenceCache
from trainers.setup import set_up

ROWS = 6


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every forward pass of a scorer."""
    real, calls = Scorer.forward, []

    def counted(self, *arguments, **named):
        calls.append(1)
        return real(self, *arguments, **named)

    monkeypatch.setattr(Scorer, "forward", counted)
    return calls


@pytest.fixture
def cached(
    recipe, tiny_model: Path, tmp_path: Path, preference
) -> tuple[Callable[..., Recipe], Path, Path]:
    """A maker of recipes, with a model and a dataset of their own to change: their folders.

    All recipes share the dataset's cache; each maker's call has a run folder of its own.
    """
    model, data = tmp_path / "checkpoint", tmp_path / "data"
    shutil.copytree(tiny_model, model)
    (data / "media").mkdir(parents=True)
    rows = []
    for number in range(ROWS):
        row = preference(number)
        (data / "media" / f"{number}.png").write_bytes(row.images[0].bytes)
        rows.append(replace(row, images=(Media(path=f"{number}.png"),)))
    write_dataset(data, Preference, rows)
    made = []

    def make(**sections: Any) -> Recipe:
        made.append(1)
        values = {
            "model": {"path": str(model)},
            "data": {"path": str(data)},
            "loss": {"name": "dpo"},
            "reference": "cached",
            "reference_cache": None,
            "optim": {"micro_batch_size": 2},
            "run": {"output": str(tmp_path / f"run-{len(made)}")},
        }
        for name, section in sections.items():
            nested = isinstance(section, dict) and "name" not in section
            values[name] = values.get(name, {}) | section if nested else section
        return recipe(**values)

    return make, model, data


def start(recipe: Recipe) -> Cached:
    """All that a run does before its first step; its reference."""
    run = RunDirectory(recipe)
    try:
        reference = set_up(recipe, open_dataset(recipe.data.path), run).reference
    finally:
        run.release()
    assert isinstance(reference, Cached)
    return reference


def equal(one: Cached, two: Cached) -> bool:
    return len(one.rows) == len(two.rows) and all(
        (a.id, a.sizes) == (b.id, b.sizes) and torch.equal(a.logps, b.logps)
        for a, b in zip(one.rows, two.rows, strict=True)
    )


def folders(data: Path) -> list[Path]:
    return sorted((data / "reference").iterdir())


def final(recipe: Recipe) -> bytes:
    for _ in train(recipe):
        pass
    return (recipe.run.output / "model" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        {"optim": {"lr": 0.5, "batch_size": 6, "micro_batch_size": 3, "epochs": 4, "steps": None}},
        {"run": {"seed": 5}},
        {"model": {"lora": {"rank": 2}}},
        {"model": {"lora": None}},
        {"model": {"train": {"projector": True}}},
        {"model": {"attention": "eager", "gradient_checkpointing": True}},
        {"scorer": {"layout": "padded"}},
        {"loss": {"name": "dpo", "beta": 0.7, "sft_weight": 1.0}},
        {"loss": {"name": "ipo"}},
        {"data": {"workers": 1, "cache_mb": 0}},
    ],
)
def test_runs_that_differ_in_nothing_that_changes_a_score_share_it(cached, passes, other):
    make, _, data = cached
    first = start(make())
    assert len(passes) == ROWS / 2
    assert equal(start(make(**other)), first)
    assert len(passes) == ROWS / 2
    assert len(folders(data)) == 1


def test_stored_scores_are_those_of_the_model(cached):
    make, _, _ = cached
    recipe = make(loss={"name": "rdpo_competitor"})
    run = RunDirectory(recipe)
    parts = set_up(recipe, open_dataset(recipe.data.path), run)
    batch = next(parts.batches(first_step=0))
    assert parts.reference is not None
    stored = parts.reference(batch)
    with torch.no_grad():
        scored = parts.scorer(batch.plan, competitor=True)
    assert torch.equal(stored.mask, scored.mask)
    assert torch.allclose(stored.logps, scored.logps, atol=1e-6)
    assert torch.allclose(stored.competitor_logps, scored.competitor_logps, atol=1e-6)


def test_training_is_the_same_to_the_bit_whoever_made_the_scores(cached, tmp_path: Path, passes):
    make, _, data = cached
    made_by_itself = final(make(reference_cache=str(tmp_path / "own")))
    folder = precompute(make())
    assert folder == folders(data)[0]
    before = len(passes)
    read = final(make())
    # Six steps of two micro-batches, and not one pass of the reference.
    assert len(passes) - before == 12
    assert read == made_by_itself == final(make())


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A change of one place in a file of a checkpoint."""

    def change(model: Path) -> None:
        text = (model / name).read_text()
        assert text.count(old) == 1
        (model / name).write_text(text.replace(old, new))

    return change


def change_one_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[head].view(-1)[1] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def add_token(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_one_weight, r"weights was \"\w+\", is \"\w+\""),
        (
            replaced("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
            r"model\.config\.text_config\.rms_norm_eps was 1e-06, is 1e-05",
        ),
        (
            replaced("processor_config.json", '"resample": 3', '"resample": 2'),
            r"processor\.image_processor\.resample was 3, is 2",
        ),
        (
            replaced("chat_template.jinja", "block['text'] + ' '", "block['text'] + '  '"),
            r"chat template was",
        ),
        (add_token, r"tokenizer was"),
    ],
)
def test_another_checkpoint_at_the_same_path_is_an_error(cached, passes, change, told: str):
    make, model, _ = cached
    start(make())
    change(model)
    refused(make(), told, passes)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"max_pixels": 144}}, r"model\.max_pixels was null, is 144"),
        ({"model": {"frames": {"num_frames": 8}}}, r"model\.frames\.num_frames was 16, is 8"),
        ({"data": {"max_tokens": 200}}, r"data\.max_tokens was null, is 200"),
        ({"data": {"min_response_tokens": 2}}, r"data\.min_response_tokens was 1, is 2"),
        ({"run": {"precision": "bf16"}}, r"run\.precision was \"float32\", is \"bf16\""),
        (
            {"model": {"dtype": "bfloat16"}},
            r"model\.dtype was \"float32\", is \"bfloat16\"; weights was",
        ),
    ],
)
def test_another_setting_that_changes_a_score_is_an_error(cached, passes, sections, told: str):
    make, _, _ = cached
    start(make())
    refused(make(**sections), told, passes)
    start(make())


def refused(recipe: Recipe, told: str, passes: list[int]) -> None:
    before = len(passes)
    with pytest.raises(TrainingError, match=rf"stale: {told}.*--fresh.*reference_cache"):
        start(recipe)
    assert len(passes) == before


def test_an_adapter_counts_from_its_first_change(tiny_model: Path):
    plain = ModelConfig(path=str(tiny_model))
    adapted = plain.model_copy(
        update={"lora": Lora(rank=2), "train": TrainParts(projector=True, vision=True)}
    )
    base = weights_hash(load_policy(plain).model)
    narrow = {"dtype": "bfloat16"}
    assert weights_hash(load_policy(plain.model_copy(update=narrow)).model) == weights_hash(
        load_policy(adapted.model_copy(update=narrow)).model
    )
    for part in ("q_proj.lora_B.default", "multi_modal_projector.modules_to_save.default"):
        model = load_policy(adapted).model
        assert weights_hash(model) == base
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if part in n).view(-1)[0] += 1
        assert weights_hash(model) != base


@pytest.mark.parametrize("double", [False, True])
def test_the_scales_of_quantised_weights_count(double: bool):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (1, 1, 2):
        layer = bitsandbytes.nn.Linear4bit(
            64, 64, bias=False, quant_type="nf4", compress_statistics=double
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight * scale, requires_grad=False, quant_type="nf4", compress_statistics=double
        )
        layer = layer.to("cpu")
        assert layer.weight.dtype == torch.uint8
        found.append((layer.weight.data, weights_hash(layer)))
    # Twice the weights are the same codes under twice the scales.
    assert torch.equal(found[0][0], found[2][0])
    assert found[0][1] == found[1][1] != found[2][1]


def test_weights_in_pieces_are_refused():
    model = torch.nn.Linear(2, 2)
    model.weight.data = torch.empty(0)  # As ZeRO-3 leaves it on loading.
    with pytest.raises(TrainingError, match="in pieces"):
        weights_hash(model)


def test_another_dataset_at_the_same_path_is_an_error(cached, passes):
    make, _, data = cached
    start(make())
    rows = list(open_dataset(data))
    rows[3] = replace(rows[3], rejected="A dog.")
    write_dataset(data, Preference, rows)
    refused(make(), r"dataset was \"\w+\", is \"\w+\"", passes)


def test_a_replaced_picture_is_an_error_that_names_the_row(cached, passes):
    make, _, data = cached
    start(make())
    shutil.copy(data / "media" / "1.png", data / "media" / "4.png")
    told = r"pictures or clips were replaced; got other files for row-4\."
    refused(make(), told, passes)
    # A row that is not used may have any picture.
    start(make(data={"limit": 4}))


def test_another_adapter_at_the_same_path_is_an_error(cached, passes, tmp_path: Path):
    make, _, data = cached
    final(make(reference="adapter_off", optim={"steps": 1, "batch_size": 2}))
    adapter = tmp_path / "run-1" / "model"
    merged = {"adapter": str(adapter), "lora": None}
    start(make())
    start(make(model=merged))
    assert len(folders(data)) == 2
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    next(v for k, v in weights.items() if "lora_B" in k).view(-1)[0] += 0.5
    save_file(weights, file)
    start(make())
    refused(make(model=merged), r"weights was", passes)


@pytest.mark.parametrize("other", ["model", {"name": "rdpo"}, {"name": "rdpo_competitor"}], ids=str)
def test_another_model_or_other_candidates_have_scores_of_their_own(
    cached, passes, tmp_path: Path, other
):
    make, model, data = cached
    first = start(make())
    shutil.copytree(model, tmp_path / "other" / "model")
    section = {"model": {"path": str(tmp_path / "other/model")}} if other == "model" else {}
    start(make(**(section or {"loss": other})))
    assert len(passes) == ROWS
    assert len(folders(data)) == 2
    assert equal(start(make()), first)
    assert len(passes) == ROWS


def test_a_row_in_other_tokens_is_caught_where_it_is_used(cached, monkeypatch: pytest.MonkeyPatch):
    """As by a library that renders or cuts otherwise, of which the key knows nothing."""
    make, _, _ = cached
    start(make())
    real = PairObjective.prepare

    def otherwise(self, record):
        row = real(self, record)
        first = row.candidates[0]
        ids = [*first.response_ids[:-2], first.response_ids[-1]]
        own = replace(first, response_ids=ids) if record.id == "row-2" else first
        return replace(row, candidates=(own, *row.candidates[1:]))

    monkeypatch.setattr(PairObjective, "prepare", otherwise)
    with pytest.raises(TrainingError, match=r"row row-2: the row's tokens are not those"):
        list(train(make()))


def test_only_missing_rows_are_scored(cached, passes):
    make, _, data = cached
    few = start(make(data={"limit": 2}))
    assert len(passes) == 1
    everything = start(make())
    assert len(passes) == 3
    assert equal(Cached(everything.rows[:2]), few)
    assert [file.name for file in sorted(folders(data)[0].glob("*.parquet"))] == [
        "rows-00000000.parquet",
        "rows-00000002.parquet",
    ]
    start(make(data={"limit": 5}))
    assert len(passes) == 3


def test_a_stopped_pass_goes_on_at_the_first_missing_file(
    cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make, _, data = cached
    whole = start(make(reference_cache=str(tmp_path / "whole")))
    monkeypatch.setattr("trainers.reference_cache.SHARD_ROWS", 2)
    real, calls = Scorer.forward, []

    def stops(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **named)

    monkeypatch.setattr(Scorer, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        start(make())
    files = sorted(folders(data)[0].glob("rows-*.parquet"))
    assert [file.name for file in files] == ["rows-00000000.parquet", "rows-00000002.parquet"]
    before = [file.read_bytes() for file in files]
    assert equal(start(make()), whole)
    assert len(calls) == 4
    assert [file.read_bytes() for file in files] == before


def test_a_damaged_file_is_made_again_and_no_other(cached, passes, monkeypatch, caplog):
    make, _, data = cached
    monkeypatch.setattr("trainers.reference_cache.SHARD_ROWS", 2)
    whole = start(make())
    files = sorted(folders(data)[0].glob("rows-*.parquet"))
    good = files[1].read_bytes()
    middle = len(good) // 2
    for bad in (good[:-9], b"", good[:200] + bytes([good[200] ^ 1]) + good[201:]):
        files[1].write_bytes(bad)
        passes.clear()
        assert equal(start(make()), whole)
        assert len(passes) == 1, middle
        assert files[1].read_bytes() == good
    assert "is damaged" in caplog.text


def test_scores_that_nothing_explains_are_an_error(cached, passes):
    make, _, data = cached
    start(make())
    key = folders(data)[0] / KEY
    key.write_text("{")
    with pytest.raises(TrainingError, match=r"key\.json: cannot be read .*--fresh"):
        start(make())
    key.unlink()
    with pytest.raises(TrainingError, match=r"no key\.json that says of what.*--fresh"):
        start(make())


def test_the_key_is_in_plain_words_and_the_dataset_stays_what_it_is(cached):
    make, model, data = cached
    before = open_dataset(data).manifest
    start(make())
    told = json.loads((folders(data)[0] / KEY).read_text())
    assert told["of"]["model"] == str(model)
    assert told["key"]["processor"]["image_processor"]["size"] == {"shortest_edge": 16}
    assert told["made with"]["device"] == "cpu"
    after = open_dataset(data)
    assert after.manifest == before
    assert content_hash(data, after.manifest.shards) == before.content_hash
    assert len(after) == ROWS


def test_a_dataset_folder_that_cannot_be_written_is_told_the_way_out(cached, tmp_path: Path):
    make, _, data = cached
    (data / "reference").write_text("in the way, as a read-only disk would be")
    with pytest.raises(TrainingError, match=r"cannot be written here .*Set reference_cache"):
        start(make())
    start(make(reference_cache=str(tmp_path / "elsewhere")))


def test_scores_that_another_process_is_making_are_told(cached, passes):
    make, _, data = cached
    start(make(data={"limit": 2}))
    writer = ReferenceCache(folders(data)[0], key={}, about={})
    writer.hold()
    with pytest.raises(TrainingError, match="another process is making these reference scores"):
        start(make())
    start(make(data={"limit": 2}))  # Reading needs no lock.
    writer.release()
    start(make())
    assert len(passes) == 3


def test_precompute_fresh_replaces_stale_scores(cached, tmp_path: Path, passes, capsys):
    make, _, data = cached
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(make(reference="auto")))
    assert command(["precompute", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(folders(data)[0])
    assert len(passes) == ROWS / 2
    assert command(["precompute", str(file), "model.max_pixels=144"]) == 2
    assert "model.max_pixels was null, is 144" in capsys.readouterr().err
    assert command(["precompute", str(file), "model.max_pixels=144", "--fresh"]) == 0
    assert len(passes) == ROWS
    start(make(model={"max_pixels": 144}))
    assert len(passes) == ROWS
    # The run's own folder is training's alone.
    assert not (tmp_path / "run-1").exists()


def test_precompute_says_its_rate_and_size(cached, caplog):
    make, _, _ = cached
    caplog.set_level("INFO", logger="mmalign")
    precompute(make())
    told = [record.getMessage() for record in caplog.records]
    assert any("6 of 6 rows to be made" in line for line in told)
    assert any("per second" in line and "MB on disk" in line for line in told)


def test_precompute_is_refused_where_stored_scores_have_no_use(cached):
    make, _, _ = cached
    for loss, told in (("sft", "compares with no reference"), ("dpo_kl", "does not keep")):
        with pytest.raises(ConfigError, match=told):
            precompute(make(reference="auto", loss={"name": loss}))


def test_a_cache_folder_that_nothing_reads_is_refused(cached, tmp_path: Path):
    make, _, _ = cached
    with pytest.raises(ConfigError, match="reference=cached alone"):
        make(reference="auto", reference_cache=str(tmp_path))
