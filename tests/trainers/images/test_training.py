"""Runs over image pairs on small pipelines: exactness, resume, what is cached, bad input."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.config import dump_yaml
from mmalign.errors import ConfigError, MmalignError, SchemaMismatch, TrainingError
from mmalign.media import embed
from mmalign.records import Example, ImagePreference, Media, user
from mmalign.store import write_dataset
from trainers.images.config import ImageRecipe
from trainers.images.encode import make_encoded, store_of
from trainers.images.rows import ImageRows
from trainers.loop import Finished, Saved, Stepped, train
from trainers.recipes import kind_of, load_recipe, load_text_recipe
from trainers.setup import new_accelerator

# As in test_distributed.py.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0", "-m", "trainers"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": {"name": "mapo"}},
        {"loss": {"name": "diffusion_sft"}},
        {"loss": {"name": "diffusion_dpo"}},
        {"loss": {"name": "diffusion_dpo"}, "model__lora": {"rank": 2}},
        {"model__lora": {"rank": 2}, "model__gradient_checkpointing": True},
        {"run__precision": "bf16", "data__random_crops": 2},
        {"denoiser": {"min_snr_gamma": 5.0, "sample": False}},
    ],
)
def test_every_loss_trains_and_what_it_saves_loads(
    folder, data, tmp_path, changes, recipe_of, trained
):
    from diffusers import StableDiffusionXLPipeline

    recipe = recipe_of(folder, data, tmp_path / "run", **changes)
    metrics, _ = trained(recipe)
    assert len(metrics) == 3
    if recipe.loss.name == "diffusion_dpo":
        assert metrics[0]["train/loss"] == pytest.approx(np.log(2), rel=1e-6)
        assert metrics[0]["train/margin"] == 0
        assert metrics[-1]["train/margin"] != 0
    if recipe.loss.name.startswith("mapo"):
        assert metrics[0]["train/rejected_error"] > 0
    if recipe.model.lora is None:
        StableDiffusionXLPipeline.from_pretrained(tmp_path / "run/model")
    else:
        StableDiffusionXLPipeline.from_pretrained(folder).load_lora_weights(
            str(tmp_path / "run/model")
        )


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_other_backbones_train_by_the_same_losses(kind, data, tmp_path, tiny_pipeline, recipe_of):
    other = tiny_pipeline(kind)
    for loss in ("mapo", "diffusion_dpo"):
        recipe = recipe_of(other, data, tmp_path / f"run-{loss}", loss={"name": loss})
        metrics = [e.metrics for e in train(recipe) if isinstance(e, Stepped)]
        assert all(np.isfinite(m["train/loss"]) for m in metrics)


def test_cutting_a_batch_changes_nothing_but_rounding(folder, data, tmp_path, recipe_of, trained):
    _, whole = trained(recipe_of(folder, data, tmp_path / "whole"))
    cut = recipe_of(folder, data, tmp_path / "cut", optim__micro_batch_size=1)
    _, pieces = trained(cut)
    assert_same_training(folder, whole, pieces)


def test_a_stopped_run_ends_as_one_that_was_not(folder, data, tmp_path, recipe_of, trained, equal):
    _, whole = trained(recipe_of(folder, data, tmp_path / "whole", optim__steps=4))
    recipe = recipe_of(folder, data, tmp_path / "cut", optim__steps=4, run__save_every_steps=2)
    events = train(recipe)
    assert next(event for event in events if isinstance(event, Saved)).step == 2
    events.close()
    _, resumed = trained(recipe)
    assert equal(whole, resumed)


def test_two_processes_equal_one(folder, data, tmp_path, recipe_of, trained):
    """Also in which rows they take: with a limit, the survey goes in rounds. And with an average
    and pictures, which are the first one's alone to make."""
    changes: dict[str, Any] = {"optim__micro_batch_size": 2, "data__limit": 5, "ema": {}}
    _, one = trained(recipe_of(folder, data, tmp_path / "one", **changes))
    changes["validation"] = {"prompts": ["a seven"], "num_steps": 2, "every_steps": 2}
    recipe = recipe_of(folder, data, tmp_path / "two", **changes)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    encoded = f"data.encoded={tmp_path / 'encoded'}"
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(tmp_path / "recipe.yaml"), encoded],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 processes x 1 micro-batches of 2") == 1
    two = load_file(tmp_path / "two/model/unet/diffusion_pytorch_model.safetensors")
    assert_same_training(folder, one, two)
    drawn = sorted(file.parent.name for file in (tmp_path / "two/samples").rglob("0.png"))
    assert drawn == ["step-000000", "step-000002", "step-000003"]


def assert_same_training(folder: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two runs moved the weights alike, but for rounding."""
    start = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    moved = sum((one[n] - start[n]).square().sum() for n in one).sqrt()
    apart = sum((one[n] - other[n]).square().sum() for n in one).sqrt()
    assert apart < 0.01 * moved


def test_beta_0_is_sft_to_the_bit(folder, data, tmp_path, recipe_of, trained, equal):
    _, sft = trained(recipe_of(folder, data, tmp_path / "sft", loss={"name": "diffusion_sft"}))
    zero = {"name": "mapo_released", "beta": 0.0}
    _, mapo = trained(recipe_of(folder, data, tmp_path / "mapo", loss=zero))
    assert equal(sft, mapo)


def gradient(recipe: ImageRecipe) -> dict[str, torch.Tensor]:
    """After one step of plain descent, which the weights show."""
    from mmalign.store import open_dataset
    from trainers.directory import RunDirectory
    from trainers.images.setup import set_up_images

    run = RunDirectory(recipe)
    parts = set_up_images(recipe, open_dataset(recipe.data.path), run)
    batch = next(parts.batches(first_step=0))
    loss = recipe.loss(parts.score(batch, None), None, batch.table, parts.survey.totals([0] * 4))
    loss.loss.backward()
    run.release()
    named = parts.policy.model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def test_identical_images_add_nothing_to_the_chosen_ones_gradient(
    folder, tmp_path, recipe_of, pairs
):
    """Of the same pixels in other bytes: z is 0 and its gradient in the weights too."""
    rows = []
    for row in pairs():
        buffer = io.BytesIO()
        Image.open(io.BytesIO(row.chosen.bytes)).save(buffer, "PNG", compress_level=0)
        rows.append(
            ImagePreference(
                id=row.id,
                prompt=row.prompt,
                chosen=row.chosen,
                rejected=Media(bytes=buffer.getvalue()),
            )
        )
    write_dataset(tmp_path / "same", ImagePreference, rows)
    data, sft = tmp_path / "same", {"name": "diffusion_sft"}
    found = gradient(recipe_of(folder, data, tmp_path / "a"))
    wanted = gradient(recipe_of(folder, data, tmp_path / "b", loss=sft))
    norm = sum(g.square().sum() for g in wanted.values()).sqrt()
    for name, value in wanted.items():
        assert (found[name] - value).norm() < 1e-4 * norm, name


def test_latents_are_made_once_and_damage_is_made_good(
    folder, data, tmp_path, monkeypatch, recipe_of, trained, equal
):
    first = recipe_of(folder, data, tmp_path / "one")
    _, weights = trained(first)
    stored = sorted((data / "encoded").glob("*/encoded-*.safetensors"))
    assert stored
    from trainers.images import encode

    def refuse(config):
        raise AssertionError("the encoders were loaded again")

    with monkeypatch.context() as patched:
        patched.setattr(encode, "load_encoders", refuse)
        _, again = trained(recipe_of(folder, data, tmp_path / "two"))
    assert equal(weights, again)
    stored[0].write_bytes(stored[0].read_bytes()[:100])
    _, mended = trained(recipe_of(folder, data, tmp_path / "three"))
    assert equal(weights, mended)


def test_other_encoders_are_not_taken_for_these(folder, data, tmp_path, recipe_of, trained):
    trained(recipe_of(folder, data, tmp_path / "one"))
    moved = tmp_path / "moved" / folder.name
    shutil.copytree(folder, moved)
    file = moved / "text_encoder/model.safetensors"
    key = next((data / "encoded").glob("*/key.json"))
    told = json.loads(key.read_text())
    told["key"]["files"]["vae/diffusion_pytorch_model.safetensors"] = "another"
    key.write_text(json.dumps(told))
    assert file.exists()
    with pytest.raises(TrainingError, match="stale"):
        trained(recipe_of(folder, data, tmp_path / "two"))


def test_rows_that_cannot_be_used_are_counted_by_reason(
    folder, tmp_path, recipe_of, trained, picture, pairs
):
    rows = pairs(4)
    same = embed(picture(9))
    odd = [
        {"id": "tie", "p_target": 0.5},
        {"id": "reversed", "p_target": 0.2},
        {"id": "broken", "rejected": Media(bytes=b"no picture")},
        {"id": "same", "chosen": same, "rejected": same},
        {"id": "grey", "chosen": embed(picture(20, mode="L")), "rejected": embed(picture(21))},
    ]
    for values in odd:
        known = {"prompt": "a three", "chosen": embed(picture(7)), "rejected": embed(picture(8))}
        rows.append(ImagePreference(**(known | values)))
    write_dataset(tmp_path / "data", ImagePreference, rows)
    trained(recipe_of(folder, tmp_path / "data", tmp_path / "run"))
    survey = json.loads((tmp_path / "run/start.json").read_text())["survey"]
    assert survey["dropped"] == {
        "reversed": ["reversed"],
        "same_image": ["same"],
        "tie": ["tie"],
        "unreadable_media": ["broken"],
    }
    assert survey["ids"] == ["0", "1", "2", "3", "grey"]


def test_numbers_that_are_not_finite_name_the_vae(folder, data, tmp_path, recipe_of, trained):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    from safetensors.torch import save_file

    file = broken / "vae/diffusion_pytorch_model.safetensors"
    weights = {name: tensor * 1e30 for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(weights, file)
    with pytest.raises(TrainingError, match="sdxl-vae-fp16-fix"):
        trained(recipe_of(broken, data, tmp_path / "run"))


def test_long_prompts_are_cut_and_counted(folder, tmp_path, caplog, recipe_of, trained, picture):
    rows = [
        ImagePreference(
            id=f"{n}", prompt="a seven " * 60, chosen=embed(picture(n)), rejected=embed(picture(9))
        )
        for n in range(4)
    ]
    write_dataset(tmp_path / "data", ImagePreference, rows)
    caplog.set_level("WARNING", logger="mmalign")
    trained(recipe_of(folder, tmp_path / "data", tmp_path / "run"))
    assert "1 of 1 prompts are cut at 77 tokens" in caplog.text


def test_a_batch_shares_noise_and_time_within_a_pair_and_tells_each_size(
    folder, data, tmp_path, recipe_of, equal, picture
):
    from mmalign.diffusion.load import load_policy
    from mmalign.store import open_dataset

    recipe = recipe_of(folder, data, tmp_path / "run")
    dataset, policy = open_dataset(data), load_policy(recipe.model)
    rows = ImageRows(dataset, recipe, policy.backbone, with_rejected=True, num_steps=1000)
    accelerator = new_accelerator()
    survey = rows.survey(accelerator)
    rows.store = store_of(recipe)
    make_encoded(recipe, policy.backbone, rows.store, *rows.wanted(), None, accelerator)
    plan = rows.batch(survey, 3, [0, 1]).plan
    for values in (plan.noise, plan.steps, plan.conditions["text_embeds"]):
        assert torch.equal(values[:2], values[2:])
    assert not torch.equal(plan.noise[0], plan.noise[1])
    # Height and width of each picture, not of the pair's first one.
    assert plan.conditions["time_ids"][:, :2].tolist() == [[32, 40], [32, 41], [36, 32], [37, 32]]
    assert plan.conditions["time_ids"].dtype == torch.float32
    again = rows.batch(survey, 3, [1]).plan
    assert torch.equal(again.latents[0], plan.latents[1])
    assert not torch.equal(rows.batch(survey, 4, [0]).plan.noise[0], plan.noise[0])


def test_kinds_are_told_apart_and_mismatches_told(folder, data, tmp_path, recipe_of):
    assert kind_of({"loss": {"name": "mapo"}}) is ImageRecipe
    assert kind_of({"loss": {"name": "dpo"}}) is not ImageRecipe
    assert kind_of({}) is not ImageRecipe
    write_dataset(tmp_path / "text", Example, [Example(id="0", prompt=user("?"), answer="!")])
    with pytest.raises(SchemaMismatch, match="image_preference"):
        list(train(recipe_of(folder, tmp_path / "text", tmp_path / "run")))
    with pytest.raises(ConfigError, match="needs an adapter"):
        recipe_of(folder, data, tmp_path / "run", reference="adapter_off")


def test_verbs_for_text_refuse_a_recipe_over_images(tmp_path):
    file = tmp_path / "mapo.yaml"
    file.write_text("loss: {name: mapo}")
    with pytest.raises(ConfigError, match="mmalign train"):
        load_text_recipe(file)
    with pytest.raises(ConfigError, match=r"data\.resolution|data"):
        load_recipe(file)


def test_a_finished_run_is_not_run_again(folder, data, tmp_path, recipe_of, trained):
    recipe = recipe_of(folder, data, tmp_path / "run", optim__steps=1)
    trained(recipe)
    assert [type(event) for event in train(recipe)] == [Finished]
    with pytest.raises(MmalignError, match="another recipe"):
        list(train(recipe_of(folder, data, tmp_path / "run", optim__steps=2)))
