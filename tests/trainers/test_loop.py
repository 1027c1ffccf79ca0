from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trainers.loop
from mmalign.errors import SchemaMismatch, TrainingError
from mmalign.losses import DPO, RDPO, RDPOCompetitor
from mmalign.models.load import ModelConfig, Policy, load_policy, trained_outside_adapter
from mmalign.records import Media, Preference
from mmalign.scores import LossOutput
from mmalign.scoring.scorer import Scorer
from mmalign.store import open_dataset, write_dataset
from trainers.checkpoint import save_model
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.loop import Finished, Saved, Stepped, train
from trainers.setup import attention_of, set_up, switch_off_dropout

FULL = {"lora": None}


def run(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics of every step, and the final weights."""
    events = list(train(recipe))
    (weights,) = recipe.run.output.glob("model/*.safetensors")
    assert events[-1] == Finished(path=recipe.run.output / "model")
    return [event.metrics for event in events if isinstance(event, Stepped)], load_file(weights)


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def moved(folder: Path, name: str) -> dict[str, str]:
    return {"output": str(folder / name)}


def test_the_loop_knows_no_method():
    text = Path(trainers.loop.__file__).read_text().lower()
    assert not re.search(r"dpo|sft|rrpo|mapo|grpo|contrast|rejected", text)
    assert text.count("\n") <= 250


def test_micro_batches_change_nothing_but_rounding(recipe, tmp_path):
    for loss in ({"name": "rdpo", "sft_weight": 0.5}, {"name": "sft"}):
        found = [
            run(
                recipe(
                    model=FULL,
                    loss=loss,
                    optim={"micro_batch_size": size, "epsilon": 1e-3},
                    run=moved(tmp_path, f"{loss['name']}-{size}"),
                )
            )
            for size in (4, 1)
        ]
        (whole, weights), (cut, cut_weights) = found
        # Adam forgets the scale of a gradient, the norm does not.
        for name in ("train/loss", "train/grad_norm"):
            assert [m[name] for m in cut] == pytest.approx([m[name] for m in whole], rel=1e-5)
        assert largest_difference(weights, cut_weights) < 1e-6


def test_the_first_step_of_rdpo_is_two_log_two_and_training_lowers_it(recipe):
    metrics, _ = run(recipe())
    assert metrics[0]["train/loss"] == pytest.approx(2 * 0.693147180559945, abs=1e-7)
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] - 0.05
    assert metrics[-1]["train/margin"] > 0


def test_the_three_references_are_one(recipe, tmp_path):
    found = {
        kind: run(recipe(reference=kind, loss=loss, run=moved(tmp_path, f"{kind}-{loss['name']}")))
        for loss in ({"name": "rdpo_competitor"},)
        for kind in ("adapter_off", "frozen_copy", "cached")
    }
    for kind in ("frozen_copy", "cached"):
        assert largest_difference(found["adapter_off"][1], found[kind][1]) < 1e-6


def test_adapter_off_is_the_initial_model_to_the_bit_after_training(recipe, tmp_path):
    made = recipe(optim={"steps": 3, "lr": 1e-2})
    parts = set_up(made, open_dataset(made.data.path), RunDirectory(made))
    assert parts.reference is not None
    batch = next(parts.batches(first_step=0))
    before = parts.reference(batch).logps
    policy_before = parts.scorer(batch.plan).logps.detach()
    assert torch.equal(before, policy_before)
    for _ in range(3):
        parts.scorer(batch.plan).logps.sum().backward()
        parts.optimizer.step()
        parts.optimizer.zero_grad()
    assert not torch.equal(parts.scorer(batch.plan).logps, policy_before)
    assert torch.equal(parts.reference(batch).logps, before)


def test_adapter_off_is_refused_where_something_outside_the_adapter_trains(
    recipe, monkeypatch: pytest.MonkeyPatch
):
    def leaky(*arguments) -> Policy:
        policy = load_policy(*arguments)
        next(p for n, p in policy.model.named_parameters() if "norm" in n).requires_grad_(True)
        assert len(trained_outside_adapter(policy.model)) == 1
        return policy

    monkeypatch.setattr("trainers.setup.load_policy", leaky)
    with pytest.raises(TrainingError, match=r"not the initial policy.*frozen_copy"):
        list(train(recipe(reference="adapter_off")))


def test_weights_without_a_gradient_are_named(recipe, caplog):
    caplog.set_level("INFO", logger="mmalign")
    train_all = {"vision": True, "projector": True, "language_model": True}
    made = recipe(model={"lora": None, "train": train_all}, optim={"steps": 1})
    list(train(made))
    told = [r.getMessage() for r in caplog.records if "no gradient" in r.getMessage()]
    # CLIP's last layer goes unread: LLaVA takes the features before it.
    assert len(told) == 1
    assert "vision_tower" in told[0]


def test_bfloat16_computes_and_float32_trains(recipe, tmp_path):
    exact, _ = run(recipe(run=moved(tmp_path, "exact")))
    narrow, weights = run(recipe(run={**moved(tmp_path, "narrow"), "precision": "bf16"}))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert narrow[-1]["train/loss"] != exact[-1]["train/loss"]
    assert narrow[-1]["train/loss"] == pytest.approx(exact[-1]["train/loss"], abs=0.05)


def test_gradient_checkpointing_changes_no_bit(recipe, tmp_path):
    found = [
        run(
            recipe(
                model={"lora": {"rank": 4, "alpha": 8}, "gradient_checkpointing": on},
                run=moved(tmp_path, str(on)),
            )
        )[1]
        for on in (False, True)
    ]
    assert largest_difference(*found) == 0


def test_dropout_is_off_in_training(recipe):
    made = recipe(model={"lora": {"rank": 4, "alpha": 8, "dropout": 0.9}})
    parts = set_up(made, open_dataset(made.data.path), RunDirectory(made))
    assert parts.scorer.training
    batch = next(parts.batches(first_step=0))
    with torch.no_grad():
        assert torch.equal(parts.scorer(batch.plan).logps, parts.scorer(batch.plan).logps)


def test_no_module_keeps_a_dropout_of_its_own():
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.attention_dropout = 0.3, 0.2  # CLIP's name, and Llama's.

    model = torch.nn.Sequential(Attention(), torch.nn.Dropout(0.1))
    switch_off_dropout(model)
    attention, plain = model
    assert (attention.dropout, attention.attention_dropout, plain.p) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("targets", "idle"),
    [(r".*language_model.*q_proj", False), (r".*(vision_tower|language_model).*q_proj", True)],
)
def test_adapters_outside_the_language_model_may_idle(recipe, targets: str, idle: bool):
    made = recipe(model={"lora": {"rank": 4, "alpha": 8, "targets": targets}})
    parts = set_up(made, open_dataset(made.data.path), RunDirectory(made))
    assert parts.accelerator.ddp_handler.find_unused_parameters == idle


def test_a_loss_that_is_not_finite_names_its_row_and_takes_no_step(
    recipe, monkeypatch: pytest.MonkeyPatch
):
    real, seen = DPO.__call__, []

    def broken(self, policy, reference, table, totals) -> LossOutput:
        output = real(self, policy, reference, table, totals)
        seen.append(output)
        if len(seen) < 6:
            return output
        bad = torch.tensor([0.0, float("nan")])
        return LossOutput(
            loss=output.loss + bad.sum(), per_item=output.per_item + bad, metrics=output.metrics
        )

    monkeypatch.setattr(DPO, "__call__", broken)
    made = recipe(loss={"name": "dpo"}, optim={"micro_batch_size": 2})
    with pytest.raises(TrainingError, match=r"step 3: .*not finite; got loss nan") as error:
        list(train(made))
    assert len(re.findall(r"row-\d", str(error.value))) == 1
    lines = (made.run.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_dataset_that_lacks_a_column_fails_before_a_model_is_loaded(
    recipe, tmp_path, preference, monkeypatch: pytest.MonkeyPatch
):
    write_dataset(
        tmp_path / "data", Preference, [preference(n, contrast_images=()) for n in range(3)]
    )
    made = recipe(data={"path": str(tmp_path / "data")}, model={"path": "nowhere/at-all"})
    with pytest.raises(SchemaMismatch, match="contrast_images"):
        list(train(made))
    assert not made.run.output.exists()


def test_rows_that_cannot_be_used_are_counted_and_named_before_the_first_step(
    recipe, tmp_path, preference
):
    rows = [preference(n) for n in range(6)]
    rows += [preference(6, images=(Media(path="lost.png"),)), preference(7, p_target=0.5)]
    write_dataset(tmp_path / "data", Preference, rows)
    made = recipe(data={"path": str(tmp_path / "data")}, optim={"steps": 2})
    list(train(made))
    started = json.loads((made.run.output / "start.json").read_text())["survey"]
    assert started["dropped"] == {"unreadable_media": ["row-6"], "tie_or_reversed": ["row-7"]}
    assert started["rows"] == [0, 1, 2, 3, 4, 5]
    summary = json.loads((made.run.output / "run.json").read_text())
    assert summary["rows"] == 6
    assert summary["dropped"] == {"unreadable_media": 1, "tie_or_reversed": 1}


def test_no_usable_row_is_an_error_that_counts_the_reasons(recipe, tmp_path):
    with pytest.raises(TrainingError, match=r"0 rows used, 10 dropped \(too_long 10\)"):
        list(train(recipe(data={"max_tokens": 3})))


def test_loader_processes_and_a_small_cache_change_nothing(recipe, tmp_path):
    plain = run(recipe(run=moved(tmp_path, "plain")))
    ahead = run(recipe(data={"workers": 2, "cache_mb": 0}, run=moved(tmp_path, "ahead")))
    assert largest_difference(plain[1], ahead[1]) == 0


def test_log_lines_are_means_over_their_steps(recipe, tmp_path):
    every, _ = run(recipe(run=moved(tmp_path, "every")))
    third, _ = run(recipe(run={**moved(tmp_path, "third"), "log_every_steps": 4}))
    assert len(third) == 2
    for name in ("train/loss", "train/margin", "train/grad_norm"):
        values = [metrics[name] for metrics in every]
        assert third[0][name] == pytest.approx(sum(values[:4]) / 4)
        assert third[1][name] == pytest.approx(sum(values[4:]) / 2)


def test_tensorboard_gets_the_metrics(recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = recipe(run={"trackers": ["tensorboard"]}, optim={"steps": 2})
    metrics, _ = run(made)
    board = EventAccumulator(str(made.run.output / "tensorboard")).Reload()
    found = [event.value for event in board.Scalars("train/loss")]
    assert found == pytest.approx([m["train/loss"] for m in metrics])


def test_only_the_last_checkpoints_are_kept(recipe):
    made = recipe(run={"save_every_steps": 1, "keep_last": 2})
    saved = [event for event in train(made) if isinstance(event, Saved)]
    assert [event.step for event in saved] == [1, 2, 3, 4, 5]
    assert [event.path.exists() for event in saved] == [False, False, False, True, True]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_a_saved_model_loads_as_what_was_trained(recipe, tmp_path, lora):
    made = recipe(model={"lora": lora}, loss={"name": "sft"}, optim={"lr": 1e-2})
    parts = set_up(made, open_dataset(made.data.path), RunDirectory(made))
    batch = next(parts.batches(first_step=0))
    initial = parts.scorer(batch.plan).logps.detach()
    for _ in range(2):
        parts.scorer(batch.plan).logps.sum().backward()
        parts.optimizer.step()
    save_model(parts.accelerator, parts.policy, tmp_path / "saved")
    loaded = load_policy(ModelConfig(path=str(tmp_path / "saved")))
    with torch.no_grad():
        trained = parts.scorer(batch.plan).logps
        attention = attention_of(made, loaded, parts.accelerator)
        again = Scorer(loaded.model, loaded.family, attention)(batch.plan).logps
    assert float((trained - initial).abs().max()) > 1e-2
    assert torch.allclose(again, trained, atol=1e-5)


def test_every_pair_loss_trains(recipe, tmp_path):
    for loss in (DPO(), RDPO(), RDPOCompetitor()):
        metrics, _ = run(recipe(loss=loss.model_dump(), run=moved(tmp_path, loss.name)))
        assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
