"""What gpu.py measures: the random model, TRL's steps and ours, and what they are held against."""

from __future__ import annotations

import random
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import Memory, pictures, words

LORA = {"rank": 16, "alpha": 32}


@dataclass(frozen=True)
class Sizes:
    """A LLaVA and its rows. vision, text: width, layers, heads, width of the MLP.

    works: pictures of a prompt, by the comparison's name; prompt, response: words.
    """

    side: int
    patch: int
    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    key_heads: int
    vocabulary: int
    works: dict[str, int]
    prompt: int
    response: tuple[int, int]
    gemm: int


# 1.4 billion parameters: CLIP-L's tower and a Llama; 576 tokens a picture.
LARGE = Sizes(
    side=336,
    patch=14,
    vision=(1024, 24, 16, 4096),
    text=(2048, 16, 32, 8192),
    key_heads=8,
    vocabulary=32_000,
    works={"576": 1, "1k": 2, "3k": 5},
    prompt=50,
    response=(80, 120),
    gemm=8192,
)
TINY = Sizes(
    side=32,
    patch=8,
    vision=(64, 2, 4, 128),
    text=(64, 2, 4, 128),
    key_heads=2,
    vocabulary=300,
    works={"576": 1, "1k": 2, "3k": 5},
    prompt=6,
    response=(8, 12),
    gemm=512,
)


@dataclass(frozen=True)
class Setting:
    """What every cell of a run shares. train: "lora" (on 16-bit weights) or "full"."""

    sizes: Sizes
    folder: Path
    device: str
    train: str
    steps: int
    batch: int

    @property
    def sixteen_bits(self) -> bool:
        """bfloat16 on CUDA; float32 on the CPU."""
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """Of the weights: an adapter's base is held in 16 bits, weights that train never are."""
        return "bfloat16" if self.sixteen_bits and self.train == "lora" else "float32"


def build(setting: Setting) -> None:
    """Make the model on the device, with random weights, and save it as any checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig

    from mmalign.models.tiny import TinyModel

    sizes = setting.sizes
    vocabulary = tuple(f"w{i}" for i in range(sizes.vocabulary - 8))
    TinyModel(
        output=str(setting.folder),
        words=vocabulary,
        image_size=sizes.side,
        patch_size=sizes.patch,
    ).build()
    config = AutoConfig.from_pretrained(setting.folder)
    hidden, layers, heads, mlp = sizes.vision
    config.vision_config = CLIPVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        projection_dim=hidden,
        image_size=sizes.side,
        patch_size=sizes.patch,
    )
    hidden, layers, heads, mlp = sizes.text
    small = config.text_config
    config.text_config = LlamaConfig(
        vocab_size=small.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=sizes.key_heads,
        intermediate_size=mlp,
        max_position_embeddings=small.max_position_embeddings,
        pad_token_id=small.pad_token_id,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
        tie_word_embeddings=False,
    )
    for weights in setting.folder.glob("*.safetensors"):
        weights.unlink()
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16 if setting.sixteen_bits else torch.float32
        )
    model.save_pretrained(setting.folder)


def make_rows(setting: Setting, work: str) -> list[dict]:
    """Rows of every step, with pictures that occur once."""
    sizes, rng = setting.sizes, random.Random(0)
    count, shown = setting.batch * setting.steps, sizes.works[work]
    images = pictures(count * shown, sizes.side)

    def text(count: int) -> str:
        return words(rng, count, sizes.vocabulary)

    return [
        {
            "images": images[number * shown : (number + 1) * shown],
            "prompt": text(sizes.prompt),
            "chosen": text(rng.randint(*sizes.response)),
            "rejected": text(rng.randint(*sizes.response)),
        }
        for number in range(count)
    ]


def facts(setting: Setting) -> dict:
    """Parameters; of each work, a step's tokens and floor; the GEMM rate; refused attention."""
    import torch

    from mmalign.attention.choose import heads_of, trial
    from mmalign.media import embed
    from mmalign.models.load import part_table
    from mmalign.records import user
    from mmalign.scoring.candidates import Candidate, CandidateBatch

    build(setting)
    policy = _policy(setting)
    tokens, floors = {}, {}
    for work, shown in setting.sizes.works.items():
        conditions, candidates = [], []
        for number, row in enumerate(make_rows(setting, work)):
            turn = user(row["prompt"], images=shown)
            media = [embed(image) for image in row["images"]]
            conditions.append(policy.preparer.condition(turn, media, None, id=str(number)))
            for text in (row["chosen"], row["rejected"]):
                ids = policy.preparer.response(turn, text)
                candidates.append(Candidate(condition=number, response_ids=ids))
        batch = CandidateBatch(conditions=conditions, candidates=candidates)
        prompts, responses = (
            sum(map(len, rows))
            for rows in (
                [one.prompt_ids for one in conditions],
                [one.response_ids for one in candidates],
            )
        )
        tokens[work] = (prompts + responses) / setting.steps
        floors[work] = _floors(policy, batch, setting.steps)
    dtype = torch.bfloat16 if setting.sixteen_bits else torch.float32
    heads = heads_of(policy.model.config.get_text_config())
    reasons = {name: trial(name, setting.device, dtype, heads) for name in ATTENTIONS}
    return {
        "parameters": sum(part.num_parameters for part in part_table(policy)),
        "tokens": tokens,
        "floors": floors,
        "gemm": gemm_rate(setting.device, dtype, setting.sizes.gemm),
        "refused": {name: reason for name, reason in reasons.items() if reason is not None},
    }


def gemm_rate(device: str, dtype: Any, size: int, rounds: int = 10) -> float:
    """Operations a second of a square matrix product, the best of some rounds."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.mm(a, b)
            stop.record()
            stop.synchronize()
            best = min(best, start.elapsed_time(stop) / 1000)
        else:
            started = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# What may stand behind `shared_prefix`, and what of it tries a kernel first.
ATTENTIONS = ("flex", "flash", "xformers")
CELLS = ("trl", "padded", "sdpa", *ATTENTIONS)
REFERENCES = ("step", "cached")


def measure(setting: Setting, cell: str) -> dict:
    """By work and reference: seconds, losses and peak_mb; or `refused`, the reason."""
    runs: dict[str, dict] = {}
    for work in setting.sizes.works:
        for reference in REFERENCES:
            if cell == "trl" and reference == "cached":
                continue
            # A cell that cannot run is told in the table, and the others go on.
            try:
                runs[f"{work} {reference}"] = (
                    _trl(setting, work)
                    if cell == "trl"
                    else _ours(setting, work, cell, cached=reference == "cached")
                )
            except Exception as problem:
                runs[f"{work} {reference}"] = {"refused": " ".join(str(problem).split())[:300]}
            _release(setting.device)
    return runs


def _trl(setting: Setting, work: str) -> dict:
    try:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
        from trl import DPOConfig, DPOTrainer
    except ImportError as problem:
        return {"refused": f"a part of TRL is missing here: {problem}"}
    shown = "<image>\n" * setting.sizes.works[work]
    # Our template as plain text; TRL adds no token at the start by itself.
    dataset = Dataset.from_list(
        [
            {
                "images": row["images"],
                "prompt": f"<s>USER: {shown}{row['prompt']} ASSISTANT:",
                "chosen": f" {row['chosen']}</s>",
                "rejected": f" {row['rejected']}</s>",
            }
            for row in make_rows(setting, work)
        ]
    )
    lora = setting.train == "lora"
    model, *reference = (
        AutoModelForImageTextToText.from_pretrained(
            setting.folder, dtype=getattr(torch, setting.dtype), attn_implementation="sdpa"
        )
        for _ in range(1 if lora else 2)
    )
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    adapter = {}
    if lora:
        from peft import LoraConfig

        from mmalign.models.families import family_of

        targets = family_of(model.config).lora_targets
        adapter["peft_config"] = LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=targets
        )
    clock = _Clock(setting.device)

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.start(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            clock.stop()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as out:
        trainer = InOrder(
            model=model,
            ref_model=reference[0] if reference else None,
            args=DPOConfig(
                output_dir=out, per_device_train_batch_size=setting.batch,
                max_steps=setting.steps, learning_rate=1e-5, lr_scheduler_type="constant",
                warmup_steps=0, logging_steps=1, report_to=[], use_cpu=setting.device == "cpu",
                bf16=setting.sixteen_bits, gradient_checkpointing=False, max_length=None, beta=0.1,
                max_grad_norm=1.0, weight_decay=0.0, save_strategy="no", disable_tqdm=True,
            ),
            train_dataset=dataset,
            processing_class=AutoProcessor.from_pretrained(setting.folder),
            callbacks=[Steps()],
            **adapter,
        )  # fmt: skip
        trainer.train()
    return clock.result()


def _ours(setting: Setting, work: str, cell: str, *, cached: bool) -> dict:
    from mmalign.config import validate
    from mmalign.media import embed
    from mmalign.records import Preference, user
    from mmalign.store import write_dataset
    from trainers.config import Recipe
    from trainers.loop import Stepped, train
    from trainers.sampler import Sampler

    shown, lora = setting.sizes.works[work], setting.train == "lora"
    clock = _Clock(setting.device)
    with tempfile.TemporaryDirectory() as out:
        write_dataset(
            Path(out) / "pairs",
            Preference,
            [
                Preference(
                    id=f"{number:04d}",
                    prompt=user(row["prompt"], images=shown),
                    images=tuple(embed(image) for image in row["images"]),
                    chosen=row["chosen"],
                    rejected=row["rejected"],
                )
                for number, row in enumerate(make_rows(setting, work))
            ],
        )
        reference = "cached" if cached else "adapter_off" if lora else "frozen_copy"
        recipe = validate(
            {
                "model": {
                    "path": str(setting.folder),
                    "dtype": setting.dtype,
                    "attention": cell if cell in ATTENTIONS else "sdpa",
                    "lora": LORA if lora else None,
                },
                "data": {"path": f"{out}/pairs"},
                "loss": {"name": "dpo"},
                "reference": reference,
                "scorer": {"layout": "padded" if cell == "padded" else "shared_prefix"},
                "optim": {"lr": 1e-5, "batch_size": setting.batch, "steps": setting.steps,
                          "schedule": "constant", "warmup_fraction": 0.0},
                "run": {"output": f"{out}/run", "log_every_steps": 1,
                        "precision": "bf16" if setting.sixteen_bits else "float32"},
            },
            Recipe,
            "bench",
        )  # fmt: skip
        # TRL's rows in TRL's order, so that the losses can be compared.
        with patch.object(Sampler, "batch", _in_order), closing(train(recipe)) as events:
            for event in events:
                if isinstance(event, Stepped):
                    if event.step > 1:
                        clock.stop()
                    clock.losses.append(event.metrics["train/loss"])
                    if event.step == setting.steps:
                        break  # Nobody reads the trained model.
                    clock.start(event.step)
    return clock.result()


def _in_order(sampler: Any, step: int) -> list[int]:
    return list(range(step * sampler.batch_size, (step + 1) * sampler.batch_size))


class _Clock:
    """Seconds of each step but the first, on a device that has done what it was given."""

    def __init__(self, device: str) -> None:
        self.device, self.memory = device, Memory(device)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._counts = False

    def start(self, steps_done: int) -> None:
        """Called before a step. Memory is counted from the second step on."""
        if steps_done == 1:
            self.memory.reset()
        self._counts = steps_done >= 1
        self._started = self._now()

    def stop(self) -> None:
        """Called after the step."""
        if self._counts:
            self.seconds.append(self._now() - self._started)
            self.peak = self.memory.growth()

    def result(self) -> dict:
        """What is told of the run."""
        return {"seconds": self.seconds, "losses": self.losses, "peak_mb": self.peak}

    def _now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def _policy(setting: Setting) -> Any:
    from mmalign.models.load import ModelConfig, load_policy

    lora: Any = LORA if setting.train == "lora" else None
    return load_policy(
        ModelConfig.model_validate(
            {"path": str(setting.folder), "dtype": setting.dtype, "lora": lora}
        )
    )


def _floors(policy: Any, batch: Any, steps: int) -> dict[str, float]:
    from floor import floor_of

    return {name: floor_of(policy, batch, reference=name == "step") / steps for name in REFERENCES}


def _release(device: str) -> None:
    """Give a run's memory back before the next one in this process."""
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
