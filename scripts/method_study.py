"""The lab of methods: BDHS, RRPO and MM-DPO beside base, SFT on the chosen, and plain DPO.

    python scripts/method_study.py [--seeds 1 2 3] [--workers 2] [--output runs/method_lab]
    python scripts/method_study.py --tables

For every seed: a base model from scratch on the biased digit scenes (configs/lab/model.yaml);
1000 pairs from balanced scenes for each builder, 150 steps of 32; the same on clips. What is
compared, all against base on 500 held-out balanced scenes (or clips):

own       the policy's own answers, phrases marked: SFT on the chosen, DPO, DPO + SFT, RRPO;
          RRPO without its KL, without its phrases, and DPO and RRPO over four times the rate
bdhs      BDHS pairs at three masking shares: DPO, DPO + SFT; online BDHS
noise     one label in five flipped: DPO, robust DPO, MM-DPO on a lab-trained reward model's gaps
clips     the same as `own`, on clips, with the RRPO builder's pairs from perturbed clips

Every step is a public verb's recipe with overrides; what is complete is skipped.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import lab_study as lab

LAB = Path(__file__).parent.parent / "configs" / "lab"
PAIRS = 1000
NOISE = 0.2


@dataclass(frozen=True)
class Run:
    """One training run: loss overrides on the recipe `recipe`, pairs, learning rate."""

    pairs: str
    loss: tuple[str, ...] = ("loss.name=dpo", "loss.sft_weight=0")
    rate: float = 2e-4
    recipe: str = "pairs_train"
    further: tuple[str, ...] = field(default=())


SFT = ("loss={name: sft}",)
DPO = ("loss={name: dpo}",)
DPO_SFT = ("loss={name: dpo, sft_weight: 1.0}",)
RRPO = ("loss={name: rrpo, alpha: 0.05}",)
RUNS = {
    "own": {
        "sft": Run("own", SFT),
        "dpo": Run("own", DPO),
        "dpo slow": Run("own", DPO, 5e-5),
        "dpo+sft": Run("own", DPO_SFT),
        "rrpo": Run("own", RRPO),
        "rrpo slow": Run("own", RRPO, 5e-5),
        "rrpo, no KL": Run("own", ("loss={name: rrpo, alpha: 0.0}",)),
        "rrpo, no phrases": Run("own", ("loss={name: dpo_kl, alpha: 0.05}",)),
    },
    "bdhs": {
        "dpo, 0.5": Run("bdhs0.5", DPO),
        "dpo, 0.9": Run("bdhs0.9", DPO),
        "dpo, 0.99": Run("bdhs0.99", DPO),
        "dpo+sft, 0.5": Run("bdhs0.5", DPO_SFT),
        "dpo+sft, 0.9": Run("bdhs0.9", DPO_SFT),
        "dpo+sft, 0.99": Run("bdhs0.99", DPO_SFT),
        "online dpo+sft, 0.9": Run("bdhs0.9", DPO_SFT, recipe="bdhs_online"),
    },
    "noise": {
        "dpo": Run("noisy", DPO, 5e-5),
        "robust": Run("noisy", ("loss={name: robust, flip_rate: 0.2, of: {name: dpo}}",), 5e-5),
        "mm_dpo, w 0.5": Run("noisy", ("loss={name: mm_dpo, k: fit, w: 0.5}",), 5e-5),
        "mm_dpo, no floor": Run(
            "noisy", ("loss={name: mm_dpo, k: fit, w: 0.5, gap_floor: -20.0}",), 5e-5
        ),
        "mm_dpo, w 2": Run("noisy", ("loss={name: mm_dpo, k: fit, w: 2.0}",), 5e-5),
        "dpo, clean labels": Run("scored", DPO, 5e-5),
        "mm_dpo, clean labels": Run("scored", ("loss={name: mm_dpo, k: fit, w: 0.5}",), 5e-5),
    },
}
RUNS["clips"] = {
    name: Run(run.pairs, run.loss, run.rate, recipe="clips_pairs_train")
    for name, run in RUNS["own"].items()
}
SHARES = ("0.5", "0.9", "0.99")


def recipe(name: str, overrides: list[str]) -> Path:
    """Train by configs/lab/{name}.yaml; returns the run's folder."""
    from mmalign.config import load_config
    from trainers.config import Recipe
    from trainers.loop import train

    config = load_config(LAB / f"{name}.yaml", Recipe, overrides)
    for _ in train(config):
        pass
    return config.run.output


def build(name: str, overrides: list[str]) -> Path:
    return lab.build_dataset(LAB / f"{name}.yaml", overrides)


def make_scenes(root: Path) -> None:
    lab.make_scenes(root)
    for name, (world, count, seed) in lab.TESTS.items():
        if name != "validation":
            build(
                "clips_test",
                [f"output={root}/clips/{name}", f"world={world}", f"num_clips={count}",
                 f"seed={seed}"],
            )  # fmt: skip


def make_base(root: Path, seed: int, kind: str) -> None:
    from mmalign.config import load_config
    from mmalign.models.tiny import TinyModel

    folder = root / f"seed{seed}" / kind
    model = "model" if kind == "scenes" else "clips_model"
    if not (folder / "base" / "run.json").exists():
        load_config(
            LAB / f"{model}.yaml", TinyModel, [f"output={folder}/init", f"seed={seed}"]
        ).build()
        if kind == "scenes":
            lab.build("scenes_train.yaml", [f"output={folder}/train", f"seed={100 + seed}"])
            train = "sft_base"
        else:
            build("clips_train", [f"output={folder}/train", f"seed={100 + seed}"])
            train = "clips_sft_base"
        recipe(
            train,
            [f"model.path={folder}/init", f"data.path={folder}/train",
             f"run.output={folder}/base", f"run.seed={seed}"],
        )  # fmt: skip
    measure(root, seed, kind, "base", folder / "base" / "model")


def make_pairs(root: Path, seed: int, kind: str) -> None:
    """Every builder's pairs of one seed, from the same balanced scenes with train digits."""
    folder = root / f"seed{seed}" / kind
    base = folder / "base" / "model"
    common = [f"source={folder}/pool", f"seed={seed}", f"generator.model.path={base}"]
    if kind == "clips":
        build("clips_pairs", [f"output={folder}/pool", f"seed={200 + seed}"])
        build("clips_rrpo", [f"output={folder}/own", *common])
        return
    lab.build(
        "scenes_pairs.yaml",
        [f"output={folder}/pool", f"seed={200 + seed}", "world=balanced", "counterfactual_share=0"],
    )
    lab.build("pairs_on_policy.yaml", [f"output={folder}/own", *common])
    for share in SHARES:
        build("bdhs", [f"output={folder}/bdhs{share}", f"corruption.threshold={share}", *common])
    make_reward_model(root, seed)


def make_reward_model(root: Path, seed: int) -> None:
    """Critiqued pairs of other scenes, a reward model trained on them, its gaps on our pairs."""
    folder = root / f"seed{seed}" / "scenes"
    base = folder / "base" / "model"
    lab.build(
        "scenes_pairs.yaml",
        [f"output={folder}/pool_rm", f"seed={300 + seed}", "world=balanced",
         "counterfactual_share=0"],
    )  # fmt: skip
    lab.build(
        "pairs_on_policy.yaml",
        [f"output={folder}/own_rm", f"source={folder}/pool_rm", f"seed={seed}",
         f"generator.model.path={base}"],
    )  # fmt: skip
    critique(folder / "own_rm", folder / "critiqued", start=0, count=1500)
    critique(folder / "own_rm", folder / "critiqued_test", start=1500, count=300)
    for name in ("critique_reward", "reward"):
        recipe(
            "reward",
            [f"model.path={base}", f"data.path={folder}/critiqued", f"loss={{name: {name}}}",
             f"run.output={folder}/{name}", f"run.seed={seed}"],
        )  # fmt: skip
    accuracies(folder)
    flip(folder / "own", folder / "own_flipped", seed)
    for source, output in (("own", "scored"), ("own_flipped", "noisy")):
        build(
            "score",
            [f"source={folder}/{source}", f"output={folder}/{output}",
             f"model.path={folder}/reward/model"],
        )  # fmt: skip


CRITICS = (("critique_reward", ("self", "given", "none")), ("reward", ("none",)))


def accuracies(folder: Path) -> None:
    """Share of unseen pairs that each reward model orders rightly, by where critiques come from."""
    from mmalign.records import Preference
    from mmalign.reward import Critics, Judgement, RewardModel
    from mmalign.store import open_dataset

    file = folder / "reward_accuracy.json"
    if file.exists():
        return
    dataset = open_dataset(folder / "critiqued_test", Preference)
    rows = list(dataset)
    items = [
        Judgement(
            id=f"{row.id}/{side}",
            prompt=row.prompt,
            response=getattr(row, side),
            images=row.images,
            media_root=dataset.media_root,
            critique=getattr(row, f"{side}_critique"),
        )
        for row in rows
        for side in ("chosen", "rejected")
    ]
    found = {}
    for name, sources in CRITICS:
        model = RewardModel.from_checkpoint(str(folder / name / "model"), batch_size=128)
        for source in sources:
            judged = model.judge(items, Critics(critiques=source, max_new_tokens=40))  # type: ignore[arg-type]
            rewards = [one.reward for one in judged]
            right = [a > b for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
            found[f"{name}, critique {source}"] = right
    file.write_text(json.dumps(found))


def critique(source: Path, output: Path, *, start: int, count: int) -> None:
    """Pairs with a rule's critique of both sides: what the response names wrongly, or misses."""
    from dataclasses import replace

    from mmalign.records import Preference
    from mmalign.store import MANIFEST, open_dataset, write_dataset

    if (output / MANIFEST).exists():
        return
    dataset = open_dataset(source, Preference)
    rows = [dataset[i] for i in range(start, min(start + count, len(dataset)))]
    write_dataset(
        output,
        Preference,
        [
            replace(
                row,
                chosen_critique=verdict(row.chosen, row.chosen),
                rejected_critique=verdict(row.chosen, row.rejected),
            )
            for row in rows
        ],
        builder="method_study critiques",
        media_root=dataset.manifest.media_root,
    )


def objects(caption: str) -> list[str]:
    """`the image shows a red three and a blue seven .` -> [red three, blue seven]"""
    from mmalign.handwriting import DIGITS

    words = caption.split()
    return [
        " ".join(words[max(0, i - 1) : i + 1]) for i, word in enumerate(words) if word in DIGITS
    ]


def verdict(truth: str, response: str) -> str:
    """`good : all right .`, or `bad : not a red seven and missing a blue three .`"""
    right, said = objects(truth), objects(response)
    extra = [thing for thing in dict.fromkeys(said) if thing not in right]
    lost = [thing for thing in right if thing not in said]
    faults = [f"not a {thing}" for thing in extra] + [f"missing a {thing}" for thing in lost]
    return f"bad : {' and '.join(faults)} ." if faults else "good : all right ."


def flip(source: Path, output: Path, seed: int) -> None:
    """The same pairs with chosen and rejected exchanged in one of five."""
    import random
    from dataclasses import replace

    from mmalign.records import Preference
    from mmalign.store import MANIFEST, open_dataset, write_dataset

    if (output / MANIFEST).exists():
        return
    dataset = open_dataset(source, Preference)

    def flipped(row: Preference) -> Preference:
        if random.Random(f"{seed}/{row.id}").random() >= NOISE:
            return row
        return replace(
            row,
            chosen=row.rejected,
            rejected=row.chosen,
            chosen_spans=row.rejected_spans,
            rejected_spans=row.chosen_spans,
        )

    write_dataset(
        output,
        Preference,
        [flipped(dataset[i]) for i in range(min(PAIRS, len(dataset)))],
        builder="method_study flip",
        media_root=dataset.manifest.media_root,
    )


def slug(table: str, name: str) -> str:
    return f"{table}-{name}".replace(", ", "-").replace(" ", "-")


def make_runs(root: Path, seed: int, table: str) -> None:
    kind = "clips" if table == "clips" else "scenes"
    folder = root / f"seed{seed}" / kind
    for name, run in RUNS[table].items():
        output = folder / "runs" / slug(table, name)
        recipe(
            run.recipe,
            [f"model.path={folder}/base/model", f"data.path={folder}/{run.pairs}",
             f"data.limit={PAIRS}", f"optim.lr={run.rate}", f"run.output={output}",
             f"run.seed={seed}", *run.loss, *run.further],
        )  # fmt: skip
        measure(root, seed, kind, slug(table, name), output / "model")


def measure(root: Path, seed: int, kind: str, name: str, model: Path) -> None:
    """Captions of the test and home scenes, and the KL to base on the test scenes' true ones."""
    from evals.config import EvalRecipe
    from evals.run import evaluate
    from mmalign.config import read_yaml, validate

    folder = root / f"seed{seed}" / kind / "eval" / name
    config = lab.CONFIGS / "eval.yaml" if kind == "scenes" else LAB / "clips_eval.yaml"
    shipped = "runs/quickstart/scenes/eval" if kind == "scenes" else "runs/lab/clips/test"
    for scenes in ("test", "home"):
        here = root / kind / scenes
        data = read_yaml(config)
        data |= {"name": name, "output": str(folder / scenes)}
        data["model"] |= {"path": str(model)}
        data["benchmarks"] = [
            {
                key: str(here / Path(value).relative_to(shipped))
                if str(value).startswith(shipped)
                else value
                for key, value in benchmark.items()
            }
            for benchmark in data["benchmarks"]
            if benchmark["name"] == "chair"
        ]
        evaluate(validate(data, EvalRecipe, str(config)))
    kl = folder / "kl.json"
    if not kl.exists() and name != "base":
        base = root / f"seed{seed}" / kind / "base" / "model"
        kl.write_text(
            json.dumps({s: drift(root / kind / s, base, model) for s in ("test", "home")})
        )


def drift(scenes: Path, base: Path, model: Path, count: int = 200) -> float:
    """Mean KL(base || model) of a true caption, summed over its tokens, in nats."""
    import torch

    from mmalign.models.load import ModelConfig, load_policy
    from mmalign.records import Example
    from mmalign.scoring.candidates import Candidate, CandidateBatch
    from mmalign.scoring.plan import make_plan
    from mmalign.scoring.scorer import Scorer
    from mmalign.store import open_dataset

    frames = {"num_frames": 6}
    policies = [load_policy(ModelConfig(path=str(p), frames=frames)) for p in (base, model)]  # type: ignore[arg-type]
    preparer = policies[0].preparer
    dataset = open_dataset(scenes, Example)
    rows = [row for row in dataset if row.id.endswith("caption")][:count]
    conditions = [
        preparer.condition(row.prompt, row.images, dataset.media_root, videos=row.videos)
        for row in rows
    ]
    candidates = [
        Candidate(condition=i, response_ids=preparer.response(row.prompt, row.answer or ""))
        for i, row in enumerate(rows)
    ]
    plan = make_plan(
        CandidateBatch(conditions=conditions, candidates=candidates),
        policies[0].family,
        "padded",
        image_token_id=preparer.image_token_id,
        video_token_id=preparer.video_token_id,
        pad_token_id=preparer.pad_token_id,
    )
    scorers = [Scorer(policy.model, policy.family) for policy in policies]
    with torch.inference_mode():
        reference = scorers[0](plan, distributions=True)
        scores = scorers[1](plan, against=reference.distributions, kl_of=torch.arange(len(rows)))
    return float(scores.kl.sum(-1).mean())


# --- tables -------------------------------------------------------------------------------------

HEAD = (
    "| run | CHAIR_i (by seed) | change | p | CHAIR_s | recall | exact | KL to base | home CHAIR_i "
    "| home exact | home KL |\n|" + "---|" * 11
)


class Runs(lab.Runs):
    """Captions of one kind of scenes; pooled over seeds."""

    def __init__(self, root: Path, seeds: list[int], kind: str) -> None:
        self.root, self.seeds, self.kind = root, seeds, kind
        self.exact_answers = {}
        from mmalign.store import open_dataset

        for scenes in ("test", "home"):
            self.exact_answers[scenes] = {
                self._file(record): record.answer
                for record in open_dataset(root / kind / scenes)
                if record.id.endswith("caption")
            }

    def _file(self, record) -> str:
        return (record.images or record.videos)[0].path

    def metrics(self, name: str, scenes: str, suite: str, seeds: list[int] | None = None):
        """(ratios, clusters) over the given seeds; a scene or clip is one cluster."""
        from evals.benchmarks import chair
        from evals.stats import mean

        rows = [row for seed in seeds or self.seeds for row in self.rows(name, scenes, suite, seed)]
        files = [row.get("image") or row["video"] for row in rows]
        truth = self.exact_answers[scenes]
        right = [row["answer"] == truth[file] for row, file in zip(rows, files, strict=True)]
        return chair.metrics(rows) | {"exact": mean(right)}, files

    def rows(self, name: str, scenes: str, suite: str, seed: int) -> list[dict]:
        folder = self.root / f"seed{seed}" / self.kind / "eval" / name / scenes
        text = (folder / "items" / f"{suite}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def drift(self, name: str, scenes: str) -> str:
        if name == "base":
            return "0"
        values = [
            json.loads(
                (self.root / f"seed{s}" / self.kind / "eval" / name / "kl.json").read_text()
            )[scenes]
            for s in self.seeds
        ]
        return f"{sum(values) / len(values):.2f}"

    def line(self, label: str, name: str) -> str:
        from evals.stats import paired_difference

        chair, clusters = self.metrics(name, "test", "chair")
        base, _ = self.metrics("base", "test", "chair")
        by_seed = " / ".join(
            f"{self.value(name, 'test', 'chair_i', seed=s):.1f}" for s in self.seeds
        )
        cells = [label, f"{100 * chair['chair_i'].value:.1f} ({by_seed})", "", ""]
        if name != "base":
            change = paired_difference(base["chair_i"], chair["chair_i"], clusters)
            low, high = change.relative_interval or (float("nan"),) * 2
            relative = change.relative if change.relative is not None else float("nan")
            cells[2] = f"{100 * relative:+.0f} % [{100 * low:+.0f}, {100 * high:+.0f}]"
            cells[3] = f"{change.p_value:.4f}"
        cells += [f"{100 * chair[m].value:.1f}" for m in ("chair_s", "recall", "exact")]
        cells.append(self.drift(name, "test"))
        cells += [f"{self.value(name, 'home', m):.1f}" for m in ("chair_i", "exact")]
        cells.append(self.drift(name, "home"))
        return "| " + " | ".join(cells) + " |"


def tables(root: Path, seeds: list[int]) -> str:
    out = []
    for table, named in RUNS.items():
        kind = "clips" if table == "clips" else "scenes"
        runs = Runs(root, seeds, kind)
        out += [f"\n### {table}\n", HEAD, runs.line("base", "base")]
        for name, run in named.items():
            out.append(runs.line(f"{name} @{run.rate:g}", slug(table, name)))
    if "noise" in RUNS:
        out.append(reward_table(root, seeds))
    return "\n".join(out)


def reward_table(root: Path, seeds: list[int]) -> str:
    """Accuracy of the reward models, pooled over seeds, with a 95 % interval."""
    from evals.stats import intervals, mean

    found = [
        json.loads((root / f"seed{s}" / "scenes" / "reward_accuracy.json").read_text())
        for s in seeds
    ]
    out = ["\n### reward models\n", "| reward model | Acc (by seed) | 95 % |", "|---|---|---|"]
    for name in found[0]:
        pooled = mean([float(right) for one in found for right in one[name]])
        low, high = (100 * bound for bound in intervals({"acc": pooled})["acc"])
        by_seed = " / ".join(f"{100 * sum(one[name]) / len(one[name]):.1f}" for one in found)
        out.append(f"| {name} | {100 * pooled.value:.1f} ({by_seed}) | {low:.1f} to {high:.1f} |")
    return "\n".join(out)


def main() -> None:
    parser = lab.study_parser(__doc__, "runs/method_lab")
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS])
    args = parser.parse_args()
    if args.job:
        logging.getLogger("mmalign").setLevel(logging.WARNING)
        step, *words = args.job
        if step == "worlds":
            make_scenes(args.output)
        elif step == "base":
            make_base(args.output, int(words[0]), words[1])
        elif step == "pairs":
            make_pairs(args.output, int(words[0]), words[1])
        else:
            make_runs(args.output, int(words[0]), words[1])
        return
    kinds = ["clips"] if args.only == ["clips"] else ["scenes"]
    kinds = ["scenes", "clips"] if "clips" in args.only and len(args.only) > 1 else kinds
    each = [(str(seed), kind) for kind in kinds for seed in args.seeds]
    if not args.tables:
        for step in (
            [["worlds"]],
            [["base", *one] for one in each],
            [["pairs", *one] for one in each],
            [["runs", str(seed), table] for table in args.only for seed in args.seeds],
        ):
            lab.run_jobs(step, args.workers, args.output, Path(__file__))
    for table in [*RUNS]:
        if table not in args.only:
            del RUNS[table]
    text = tables(args.output, args.seeds)
    (args.output / "tables.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
