"""Rankings trained on as they are: each response is scored once, the numbers are the pairs'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_builders.pairs import pairs_of
from mmalign.errors import SchemaMismatch, TrainingError
from mmalign.losses import DPO, MMDPO
from mmalign.models.load import load_processor
from mmalign.prepare import Preparer, RowDropped
from mmalign.records import Preference, RankedResponse, Ranking
from mmalign.scores import LossOutput, TokenScores, Totals
from mmalign.scoring.scorer import Scorer
from mmalign.store import open_dataset, write_dataset
from trainers.config import Recipe
from trainers.directory import RunDirectory
from trainers.estimate import row_tokens
from trainers.loop import Saved, Stepped, train
from trainers.objectives.base import check_dataset, fitted, objective_for, table
from trainers.precompute import precompute
from trainers.rows import Batch
from trainers.setup import Parts, set_up

# Four responses with a tie, two, three, two tied above one: 5, 1, 3 and 2 comparisons.
RANKS = [(0, 1, 1, 2), (1, 0), (2, 0, 1), (0, 0, 1)]
NUM_PAIRS = [5, 1, 3, 2]


@pytest.fixture(scope="session")
def ranking(preference) -> Callable[..., Ranking]:
    """Ranking number n with a picture of its own, and responses of these ranks."""

    def make(number: int, ranks: Sequence[int], *, scored: bool = True, **changes: Any) -> Ranking:
        row = preference(number)
        responses = tuple(
            RankedResponse(
                text=f"It is {place}" + " or so" * (place + number % 3),
                rank=rank,
                # Against the ranks at times.
                score=float((7 * place + number) % 5 - rank) if scored else None,
            )
            for place, rank in enumerate(ranks)
        )
        values = {"id": row.id, "prompt": row.prompt, "images": row.images, "responses": responses}
        return Ranking(**(values | changes))

    return make


@pytest.fixture(scope="module")
def rankings(tmp_path_factory, ranking) -> Path:
    path = tmp_path_factory.mktemp("rankings")
    write_dataset(path, Ranking, [ranking(n, ranks) for n, ranks in enumerate(RANKS)])
    return path


def expanded(path: Path, out: Path) -> Path:
    """The pairs of a dataset of rankings, each of the weight that makes every ranking count once.

    They add up to the number of pairs, which is what a step over all of them is divided by.
    """
    rows = [list(pairs_of(one)) for one in open_dataset(path, Ranking)]
    groups = [[pair for pair in row if isinstance(pair, Preference)] for row in rows]
    share = sum(map(len, groups)) / len(groups)
    pairs = [replace(pair, weight=share / len(its)) for its in groups for pair in its]
    write_dataset(out, Preference, pairs)
    return out


@pytest.fixture(scope="module")
def pairs_of_rankings(rankings, tmp_path_factory) -> Path:
    return expanded(rankings, tmp_path_factory.mktemp("expanded"))


@pytest.fixture(scope="module")
def preparer(tiny_model) -> Preparer:
    return load_processor(str(tiny_model))


def started(recipe: Recipe) -> Parts:
    run = RunDirectory(recipe)
    try:
        return set_up(recipe, open_dataset(recipe.data.path), run)
    finally:
        run.release()


def run(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics of every step, and the final weights."""
    metrics = [event.metrics for event in train(recipe) if isinstance(event, Stepped)]
    (weights,) = recipe.run.output.glob("model/*.safetensors")
    return metrics, load_file(weights)


def same(one, other, names=("train/loss", "train/grad_norm", "train/margin")) -> None:
    for name in names:
        wanted = [m[name] for m in other[0]]
        assert [m[name] for m in one[0]] == pytest.approx(wanted, rel=1e-5, abs=1e-6), name
    assert one[1].keys() == other[1].keys()
    assert max(float((one[1][k] - other[1][k]).abs().max()) for k in one[1]) < 1e-6


# --- the numbers are those of the pairs -------------------------------------------------------


def descended(parts: Parts, loss: Any, batch: Batch, totals: Totals) -> tuple[LossOutput, Any]:
    """The loss of a batch, and its gradients by parameter."""
    assert parts.reference is not None
    parts.scorer.zero_grad()
    frozen: TokenScores = parts.reference(batch)
    scores = parts.scorer(
        batch.plan,
        **parts.asked,
        against=frozen.distributions,
        kl_of=batch.table.chosen if parts.kl else None,
    )
    output = loss(scores, frozen, batch.table, totals)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in parts.scorer.named_parameters() if p.grad is not None}
    return output, grads


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "dpo", "sft_weight": 0.5},
        {"name": "dpo", "sft_weight": 0.5, "sft_mean": "responses"},
        {"name": "mm_dpo", "k": "fit", "sft_weight": 0.25},
        {"name": "dpo_kl", "alpha": 0.1},
        {"name": "robust", "of": {"name": "mm_dpo", "gap_floor": -3.0}},
    ],
    ids=lambda loss: loss["name"],
)
def test_loss_and_gradients_are_the_mean_over_the_pairs(recipe, rankings, pairs_of_rankings, loss):
    made = recipe(data={"path": str(rankings)}, loss=loss, optim={"batch_size": len(RANKS)})
    parts = started(made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parts.scorer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    dataset = open_dataset(pairs_of_rankings, Preference)
    own = fitted(made.loss, open_dataset(rankings))
    assert own == fitted(made.loss, dataset)
    objective = objective_for(own, parts.policy.preparer, dataset.media_root)
    rows = [objective.prepare(pair) for pair in dataset]
    one = parts.rows.batch(parts.survey, list(range(len(RANKS))))
    many = parts.rows.batch_of(list(range(len(rows))), rows)
    assert (one.num_pairs, len(rows)) == (NUM_PAIRS, sum(NUM_PAIRS))

    totals = parts.survey.totals(range(len(RANKS)))
    shares = [1 / count for count in NUM_PAIRS for _ in range(count)]
    tokens = sum(s * row.num_chosen_tokens for s, row in zip(shares, rows, strict=True))
    assert totals.num_pairs == len(RANKS)
    assert totals.num_chosen_tokens == pytest.approx(tokens)
    many = replace(many, table=replace(many.table, weight=torch.tensor(shares)))
    output, gradients = descended(parts, own, one, totals)
    wanted, wanted_gradients = descended(parts, own, many, totals)
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert torch.allclose(output.per_item, wanted.per_item, rtol=1e-5, atol=1e-6)
    for name, total in wanted.metrics.items():
        assert output.metrics[name].item() == pytest.approx(total.item(), rel=1e-5, abs=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    norm = torch.stack([g.norm() for g in wanted_gradients.values()]).norm()
    assert norm > 1e-3
    off = torch.stack([(gradients[n] - g).norm() for n, g in wanted_gradients.items()]).norm()
    assert off / norm < 1e-5


def test_training_is_that_of_the_weighted_pairs(recipe, rankings, pairs_of_rankings, tmp_path):
    found = {}
    for name, path, size in (
        ("rankings", rankings, len(RANKS)),
        ("pairs", pairs_of_rankings, sum(NUM_PAIRS)),
    ):
        found[name] = run(
            recipe(
                data={"path": str(path)},
                loss={"name": "mm_dpo", "k": "fit"},
                optim={"batch_size": size, "steps": 3, "epsilon": 1e-3},
                run={"output": str(tmp_path / name)},
            )
        )
    same(found["rankings"], found["pairs"])
    assert found["rankings"][0][-1]["train/loss"] < found["rankings"][0][0]["train/loss"]


def test_rankings_of_equally_many_pairs_train_as_plain_pairs(recipe, ranking, tmp_path):
    """The token-averaged term included: its denominator is the step's too."""
    rows = [ranking(n, (0, 1, 2)) for n in range(2)]
    write_dataset(tmp_path / "rankings", Ranking, rows)
    expanded(tmp_path / "rankings", tmp_path / "pairs")
    assert {pair.weight for pair in open_dataset(tmp_path / "pairs")} == {1.0}
    found = [
        run(
            recipe(
                data={"path": str(tmp_path / name)},
                loss={"name": "dpo", "sft_weight": 0.5},
                optim={"batch_size": size, "steps": 3, "epsilon": 1e-3},
                run={"output": str(tmp_path / f"run-{name}")},
            )
        )
        for name, size in (("rankings", 2), ("pairs", 6))
    ]
    same(*found, names=("train/loss", "train/grad_norm", "train/margin", "train/nll"))


# --- what is scored ---------------------------------------------------------------------------


def test_every_response_is_scored_once_behind_one_prompt(recipe, rankings):
    parts = started(
        recipe(
            data={"path": str(rankings)}, loss={"name": "dpo"}, scorer={"layout": "shared_prefix"}
        )
    )
    batch = parts.rows.batch(parts.survey, [0])
    assert len(batch.plan.mask) == len(batch.sizes[0]) == 4
    assert batch.num_pairs == [5]
    prompt = batch.tokens[0][0].prompt
    assert batch.plan.input_ids.numel() == prompt + sum(batch.sizes[0])
    assert parts.survey.tokens[0] == prompt + sum(batch.sizes[0])


def test_micro_batches_hold_about_as_many_tokens(recipe, rankings):
    optim = {"micro_batch_size": 2, "batch_size": len(RANKS)}
    parts = started(recipe(data={"path": str(rankings)}, loss={"name": "dpo"}, optim=optim))
    tokens, batches = parts.survey.tokens, parts.batches(first_step=0)
    cut = [parts.survey.num_tokens(next(batches).places) for _ in range(2)]
    assert sum(cut) == sum(tokens)
    assert abs(cut[0] - cut[1]) <= max(tokens) - min(tokens)


def test_pairs_name_the_better_and_the_worse_and_weigh_one_in_all(preparer, tmp_path, ranking):
    objective = objective_for(DPO(), preparer, tmp_path, kind=Ranking)
    one, other = ranking(0, (2, 0, 1)), ranking(1, (1, 0))
    rows = [objective.prepare(record) for record in (one, other)]
    # The best one first: responses 1, 2, 0 of the first ranking.
    texts = [one.responses[i].text for i in (1, 2, 0)]
    wanted = [preparer.response(one.prompt, text) for text in texts]
    assert [candidate.response_ids for candidate in rows[0].candidates] == wanted
    made = table(rows)
    assert made.chosen.tolist() == [0, 1, 0, 3]
    assert made.rejected is not None
    assert made.rejected.tolist() == [2, 2, 1, 4]
    assert made.weight is not None
    assert made.weight.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    scores = [response.score or 0.0 for response in one.responses]
    gaps = [scores[1] - scores[0], scores[2] - scores[0], scores[1] - scores[2]]
    assert made.score_gap is not None
    assert made.score_gap.tolist()[:3] == gaps
    lengths = [len(ids) for ids in wanted]
    assert rows[0].num_chosen_tokens == pytest.approx((2 * lengths[0] + lengths[1]) / 3)


def test_the_same_words_are_one_candidate(preparer, tmp_path, ranking):
    said = [RankedResponse(text=text, rank=rank) for text, rank in (("A", 0), ("B", 1), ("A", 2))]
    row = objective_for(DPO(), preparer, tmp_path, kind=Ranking).prepare(
        ranking(0, (), responses=tuple(said))
    )
    assert len(row.candidates) == 2
    assert [(pair.chosen, pair.rejected) for pair in row.pairs] == [(0, 1), (1, 0)]


def test_responses_without_a_score_make_no_pair_where_gaps_are_read(preparer, tmp_path, ranking):
    whole = ranking(0, (0, 1, 2))
    partly = replace(
        whole, responses=(*whole.responses[:2], replace(whole.responses[2], score=None))
    )
    rows = [
        objective_for(loss, preparer, tmp_path, kind=Ranking).prepare(partly)
        for loss in (MMDPO(), DPO())
    ]
    assert [len(row.pairs) for row in rows] == [1, 3]
    assert rows[0].pairs[0].weight == 1.0
    assert table(rows[:1]).score_gap is not None
    # Both losses read the same stored scores.
    assert rows[0].digest == rows[1].digest


@pytest.mark.parametrize(
    ("changes", "loss", "reason"),
    [
        ({"ranks": (0, 0)}, DPO(), "all_ties"),
        ({"ranks": (0, 1), "texts": ("Yes", "Yes")}, DPO(), "same_text"),
        ({"ranks": (0, 1), "texts": ("Yes", " ")}, DPO(), "bad_responses"),
        ({"ranks": (0, 1), "scored": False}, MMDPO(), "no_score_gap"),
    ],
)
def test_rankings_that_cannot_be_used_say_why(preparer, tmp_path, ranking, changes, loss, reason):
    record = ranking(0, changes["ranks"], scored=changes.get("scored", True))
    if "texts" in changes:
        renamed = zip(record.responses, changes["texts"], strict=True)
        record = replace(record, responses=tuple(replace(r, text=text) for r, text in renamed))
    with pytest.raises(RowDropped) as drop:
        objective_for(loss, preparer, tmp_path, kind=Ranking).prepare(record)
    assert drop.value.reason == reason


# --- what cannot be trained on ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ({"name": "rdpo"}, "'rdpo' reads contrast_images"),
        ({"name": "rrpo"}, "'rrpo' reads chosen_spans"),
        ({"name": "rationale_dpo"}, "'rationale_dpo' reads chosen_critique"),
        ({"name": "soft_labels"}, "'soft_labels' reads p_target"),
        (
            {"name": "critique_reward"},
            "'critique_reward' reads p_target, rejected_critique, reward_head",
        ),
        ({"name": "sft"}, "'sft' compares nothing"),
    ],
)
def test_a_loss_that_needs_more_than_a_ranking_has_names_the_way_out(recipe, rankings, loss, told):
    made = recipe(data={"path": str(rankings)}, loss=loss, model={"path": "nowhere/at-all"})
    with pytest.raises(SchemaMismatch, match=f"{told}.*mmalign data pairs {rankings}"):
        list(train(made))


def test_pairs_made_during_training_want_pairs(recipe, rankings):
    made = recipe(data={"path": str(rankings), "online": {}}, loss={"name": "dpo"})
    with pytest.raises(
        SchemaMismatch, match=r"data\.online.*wanted preference.*mmalign data pairs"
    ):
        list(train(made))


def test_a_dataset_without_a_comparison_is_refused(tmp_path, ranking):
    ties = [ranking(n, (0, 0, 0)) for n in range(3)]
    write_dataset(tmp_path / "ties", Ranking, ties)
    with pytest.raises(SchemaMismatch, match=r"different rank, and no ranking .* got 3 all_ties"):
        check_dataset(open_dataset(tmp_path / "ties"), DPO())
    write_dataset(tmp_path / "bare", Ranking, [ranking(n, (0, 1), scored=False) for n in range(2)])
    check_dataset(open_dataset(tmp_path / "bare"), DPO())
    with pytest.raises(
        SchemaMismatch, match=r"both have a score.* got 2 no_score_gap\..*score_pairs"
    ):
        check_dataset(open_dataset(tmp_path / "bare"), MMDPO())
    write_dataset(tmp_path / "empty", Ranking, [])
    with pytest.raises(SchemaMismatch, match="got no rankings"):
        check_dataset(open_dataset(tmp_path / "empty"), DPO())


# --- cuts, references, resuming ---------------------------------------------------------------


def test_micro_batches_and_layouts_change_nothing_but_rounding(recipe, rankings, tmp_path):
    def made(name: str, **changes: Any):
        return run(
            recipe(
                data={"path": str(rankings)},
                loss={"name": "mm_dpo", "sft_weight": 0.5},
                scorer=changes.pop("scorer", {}),
                optim={"steps": 4, "epsilon": 1e-3} | changes,
                run={"output": str(tmp_path / name)},
            )
        )

    whole = made("whole")
    assert "train/rankings_per_second" in whole[0][0]
    for name, changes in {
        "twos": {"micro_batch_size": 2},
        "ones": {"micro_batch_size": 1},
        "padded": {"micro_batch_size": 2, "scorer": {"layout": "padded"}},
    }.items():
        same(made(name, **changes), whole, ("train/loss", "train/grad_norm", "train/nll"))


def test_the_three_references_are_one_and_losses_share_stored_scores(
    recipe, rankings, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    def made(kind: str, **changes: Any) -> Recipe:
        values = {"data": {"path": str(rankings)}, "loss": {"name": "mm_dpo"}, "reference": kind}
        values |= {"optim": {"steps": 3, "micro_batch_size": 2}} | changes
        if kind == "cached":
            values["reference_cache"] = str(tmp_path / "scores")
        return recipe(**values, run={"output": str(tmp_path / f"{kind}-{len(changes)}")})

    precompute(made("cached", loss={"name": "dpo"}))
    calls: list[int] = []
    real = Scorer.forward
    monkeypatch.setattr(
        Scorer, "forward", lambda self, *a, **named: (calls.append(1), real(self, *a, **named))[1]
    )
    stored = run(made("cached"))
    assert len(calls) == 3 * 2  # The policy's own, and none for the reference.
    same(run(made("adapter_off")), stored)
    same(run(made("frozen_copy")), stored)


def test_a_stopped_run_ends_as_an_unbroken_one(recipe, rankings, tmp_path):
    def made(name: str) -> Recipe:
        return recipe(
            data={"path": str(rankings)},
            loss={"name": "dpo", "sft_weight": 0.5},
            optim={"batch_size": 2, "micro_batch_size": 1, "steps": 4, "lr": 1e-2},
            run={"output": str(tmp_path / name), "save_every_steps": 2, "log_every_steps": 2},
        )

    for event in train(made("stopped")):
        if isinstance(event, Saved):
            break
    resumed, whole = run(made("stopped")), run(made("whole"))
    assert len(resumed[0]) == 1
    for name in ("train/loss", "train/nll", "train/margin"):
        assert resumed[0][0][name] == whole[0][1][name]
    assert all(torch.equal(resumed[1][name], value) for name, value in whole[1].items())


def test_a_loss_that_is_not_finite_names_its_ranking(
    recipe, rankings, monkeypatch: pytest.MonkeyPatch
):
    real = DPO.__call__

    def broken(self, policy, reference, table, totals) -> LossOutput:
        output = real(self, policy, reference, table, totals)
        bad = torch.zeros(len(output.per_item))
        bad[place] = math.nan
        return replace(output, loss=output.loss + bad.sum(), per_item=output.per_item + bad)

    monkeypatch.setattr(DPO, "__call__", broken)
    made = recipe(data={"path": str(rankings)}, loss={"name": "dpo"})
    order = started(made).sampler.batch(0)
    place = sum(NUM_PAIRS[row] for row in order[:2])  # The third row's first pair.
    with pytest.raises(TrainingError, match=rf"Look at rows row-{order[2]};"):
        list(train(made))


def test_the_estimate_counts_the_prompt_once_and_every_response(recipe, rankings, preparer):
    made = recipe(data={"path": str(rankings)}, loss={"name": "dpo"})
    objective = objective_for(made.loss, preparer, rankings, kind=Ranking)
    counts = [objective.prepare(record).num_tokens for record in open_dataset(rankings, Ranking)]
    found = row_tokens(made, preparer)
    assert (found.mean, found.longest) == (sum(counts) / len(counts), max(counts))
