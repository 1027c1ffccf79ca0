"""The score head: saved and loaded with the model, whole or as an adapter, in every family."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmalign.cli import run
from mmalign.config import validate
from mmalign.errors import ConfigError, ModelError
from mmalign.media import embed
from mmalign.models.families import FAMILIES
from mmalign.models.load import ModelConfig, Policy, base_model, load_policy, part_table
from mmalign.models.reward_head import CRITIC_PROMPT, RewardHeadConfig, head_of
from mmalign.models.tiny import TinyModel
from mmalign.records import user
from mmalign.reward import Critics, Judgement, RewardModel

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES])
def path(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return TinyModel(output=str(folder), family=request.param).build()


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return TinyModel(output=str(tmp_path_factory.mktemp("tiny") / "llava")).build()


def loaded(path: Path, *, merge: bool = True, **config) -> Policy:
    made = validate({"path": str(path), **config}, ModelConfig, "test model")
    return load_policy(made, merge=merge)


def moved(policy: Policy) -> Policy:
    """The policy with everything that trains away from where it started."""
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=stream)
    return policy


def rewards(policy: Policy) -> list[float]:
    pixels = np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8)
    items = [
        Judgement(
            id=text,
            prompt=user("What is it?", images=1),
            images=(embed(Image.fromarray(pixels)),),
            response=text,
            critique=f"It says {text}",
        )
        for text in ("a dog", "no dog at all")
    ]
    return [one.reward for one in RewardModel(policy).judge(items, Critics(critiques="given"))]


def test_a_saved_reward_model_gives_the_same_rewards_to_the_bit(path, tmp_path):
    policy = moved(loaded(path, reward_head={"prompt": "{question} {response} ?"}))
    policy.save(tmp_path / "whole")
    again = loaded(tmp_path / "whole")
    assert rewards(again) == rewards(policy)
    assert len(set(rewards(again))) == 2
    assert RewardModel(again).config.prompt == "{question} {response} ?"


def test_an_adapter_carries_the_head_apart_and_merged(path, tmp_path):
    policy = moved(loaded(path, reward_head={"prompt": "{question} {response} ?"}, lora=LORA))
    policy.save(tmp_path / "adapter")
    apart = loaded(tmp_path / "adapter", merge=False)
    assert rewards(apart) == rewards(policy)
    assert RewardModel(apart).config.prompt == "{question} {response} ?"
    assert run(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = loaded(tmp_path / "merged")
    assert "reward_head" in json.loads((tmp_path / "merged" / "config.json").read_text())
    # Adapters are added to their weights in another order than apart.
    assert rewards(merged) == pytest.approx(rewards(policy), abs=1e-5)
    assert rewards(merged) == rewards(loaded(tmp_path / "adapter"))


def test_plain_transformers_loads_the_language_model(path, tmp_path):
    policy = moved(loaded(path, reward_head={}))
    policy.save(tmp_path / "whole")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    ours, ids = policy.model.state_dict(), torch.tensor([[5, 6, 7, 8]])
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(plain.eval()(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_loading_says_nothing_of_the_head(llava, tmp_path):
    loaded(llava, reward_head={}).save(tmp_path / "whole")
    ways = [
        "from transformers import AutoModelForImageTextToText; "
        "AutoModelForImageTextToText.from_pretrained({!r})",
        "from mmalign.models.load import ModelConfig, load_policy; "
        "load_policy(ModelConfig(path={!r}))",
    ]
    told = [
        subprocess.run(
            [sys.executable, "-c", code.format(str(tmp_path / "whole"))],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        for code in ways
    ]
    assert ["reward_head" in text for text in told] == [True, False]


def test_a_head_in_one_of_many_files_is_found(llava, tmp_path):
    policy = moved(loaded(llava, reward_head={}))
    policy.model.save_pretrained(str(tmp_path / "parts"), max_shard_size="50KB")  # type: ignore[operator]
    policy.processor.save_pretrained(str(tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert rewards(loaded(tmp_path / "parts")) == rewards(policy)


def test_a_fresh_head_is_the_seeds_and_draws_nothing_from_the_run(llava):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    one, two = (loaded(llava, reward_head={"seed": 1}) for _ in range(2))
    assert torch.equal(torch.rand(2), wanted)
    other = loaded(llava, reward_head={"seed": 2})
    assert rewards(one) == rewards(two) != rewards(other)
    head = head_of(one.model)
    assert head is not None
    assert [tuple(p.shape) for p in head.parameters()] == [(64, 64), (64,), (1, 64), (1,)]
    assert head.dense.bias.abs().max() == head.score.bias.abs().max() == 0  # type: ignore[union-attr]


def test_the_head_is_float32_and_trains_whatever_the_rest_does(llava):
    parts = {"vision": False, "projector": False, "language_model": False}
    probe = loaded(llava, reward_head={}, train=parts)
    assert [n for n, p in probe.model.named_parameters() if p.requires_grad] == [
        "reward_head.dense.weight", "reward_head.dense.bias",
        "reward_head.score.weight", "reward_head.score.bias",
    ]  # fmt: skip
    narrow = loaded(llava, reward_head={}, lora=LORA, dtype="bfloat16")
    head = head_of(base_model(narrow.model))
    assert head is not None
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    trained = {n.split(".")[-1] for n, p in narrow.model.named_parameters() if p.requires_grad}
    assert {"weight", "bias"} <= trained
    assert sum(part.num_trainable for part in part_table(narrow)) > 64 * 64 + 64 + 64 + 1
    assert all(isinstance(reward, float) for reward in rewards(narrow))


def test_a_promised_head_that_is_not_there_is_refused(llava, tmp_path):
    loaded(llava, reward_head={}).save(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    del tensors["reward_head.score.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"reward head whose weights are missing.*score\.bias"):
        loaded(tmp_path / "whole")


def test_an_adapter_that_lost_its_heads_settings_is_refused(llava, tmp_path):
    loaded(llava, reward_head={}, lora=LORA).save(tmp_path / "adapter")
    (tmp_path / "adapter" / "reward_head.json").unlink()
    with pytest.raises(ModelError, match="does not fit its base"):
        loaded(tmp_path / "adapter")
    (tmp_path / "adapter" / "reward_head.json").write_text("{")
    with pytest.raises(ModelError, match=r"reward_head\.json: is not JSON"):
        loaded(tmp_path / "adapter")


def test_a_second_head_is_refused(llava, tmp_path):
    loaded(llava, reward_head={}).save(tmp_path / "whole")
    with pytest.raises(ModelError, match="has a reward head already"):
        loaded(tmp_path / "whole", reward_head={})


def test_a_checkpoint_without_one_has_none(llava, tmp_path):
    policy = loaded(llava)
    assert head_of(policy.model) is None
    with pytest.raises(ModelError, match="has no reward head"):
        RewardModel(policy)
    shutil.copytree(llava, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"reward_head": {"a": 1}}))
    with pytest.raises(ConfigError, match=r"config\.json: a: unknown key"):
        loaded(tmp_path / "copy")


@pytest.mark.parametrize("prompt", ["{question}", "{response}", "{question} {response} {0}", "{"])
def test_a_prompt_has_its_two_places(prompt):
    with pytest.raises(ConfigError, match="prompt"):
        validate({"prompt": prompt}, RewardHeadConfig, "test")
    assert RewardHeadConfig(prompt=CRITIC_PROMPT).prompt.endswith("[Evaluation]:")
