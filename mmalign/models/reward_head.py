"""A score head on a vision-language model: one number for a response, read after its critique.

The head is a submodule of the transformers model, so that optimizer, DDP, FSDP and saving see it.
A checkpoint holds its tensors beside the others and its settings under `reward_head` in
config.json; an adapter's folder holds both as well, the settings in reward_head.json. Plain
transformers loads the language model of either and leaves the head aside.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, field_validator

from mmalign.config import Strict, validate
from mmalign.errors import ModelError
from mmalign.store import write_atomically

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "reward_head"
# The settings beside an adapter, whose folder has no config.json of the model.
ADAPTER_FILE = "reward_head.json"

CRITIC_PROMPT = """\
You are an unbiased evaluator. Assess the response to the question below for correctness, clarity \
and completeness, and name its strengths and what could be improved.

[Question]: {question}

[Response]: {response}

[Evaluation]:"""


class RewardHeadConfig(Strict):
    """What a reward model remembers of its training.

    prompt: what the critic is asked, with the places of {question} and {response}. It travels with
        the weights, because another wording would give other rewards.
    seed: of a fresh head's weights.
    """

    prompt: str = CRITIC_PROMPT
    seed: NonNegativeInt = 0

    @field_validator("prompt")
    @classmethod
    def _has_both_places(cls, prompt: str) -> str:
        try:
            prompt.format(question="", response="")
        except (KeyError, IndexError, ValueError):
            raise ValueError("the only fields are {question} and {response}") from None
        if "{question}" not in prompt or "{response}" not in prompt:
            raise ValueError("has no place for the {question} or for the {response}")
        return prompt


def attach(base: Any, config: RewardHeadConfig) -> None:
    """Give a transformers model a fresh head, Xavier with zero biases, and its config the settings.

    Linear(H, H), tanh, Linear(H, 1) with biases, in float32 whatever the model's dtype: it is
    small, and it trains. The released one has dropout, of probability 0, which is left out.
    """
    import torch
    from torch import nn

    width = base.config.get_text_config().hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        dense = nn.Linear(width, width, dtype=torch.float32)
        score = nn.Linear(width, 1, dtype=torch.float32)
        for layer in (dense, score):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    head = nn.Sequential(OrderedDict(dense=dense, tanh=nn.Tanh(), score=score))
    base.add_module(NAME, head.to(base.device))
    base.config.reward_head = config.model_dump()


def head_of(base: Any) -> nn.Module | None:
    """The head of a transformers model, also where peft has wrapped it; None where it has none."""
    return base._modules.get(NAME)


def rewards_of(head: nn.Module, states: Tensor) -> Tensor:
    """The head's score of each state: [N, H] to [N] float32, outside any autocast."""
    import torch

    dtype = next(head.parameters()).dtype
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(dtype)).squeeze(-1).float()


def stored_config(config: Any, where: str) -> RewardHeadConfig | None:
    """What a transformers config says of a head; None where it says nothing."""
    stored = getattr(config, NAME, None)
    return None if stored is None else validate(stored, RewardHeadConfig, where)


def adapter_config(adapter: str) -> RewardHeadConfig | None:
    """What an adapter's folder says of a head; None where it says nothing."""
    file = Path(adapter) / ADAPTER_FILE
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"is not JSON ({error})", where=str(file), fix="copy it again") from None
    return validate(stored, RewardHeadConfig, str(file))


def save_adapter_config(config: Any, folder: Path) -> None:
    """Write the settings of a model's head beside its adapter."""
    write_atomically(folder / ADAPTER_FILE, json.dumps(config.reward_head, indent=2) + "\n")


@contextmanager
def known_to_transformers() -> Iterator[None]:
    """Load a checkpoint that has a head without a report of tensors that transformers knows not."""
    from transformers import PreTrainedModel

    before = PreTrainedModel._keys_to_ignore_on_load_unexpected
    PreTrainedModel._keys_to_ignore_on_load_unexpected = [*(before or ()), rf"^{NAME}\."]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_unexpected = before


def fill(base: Any, path: str, revision: str | None) -> None:
    """Give the head its weights from a checkpoint. Raises ModelError where any are missing."""
    head = base.get_submodule(NAME)
    stored = {
        name.removeprefix(f"{NAME}."): tensor
        for name, tensor in _stored_tensors(path, revision)
        if name.startswith(f"{NAME}.")
    }
    wanted = head.state_dict()
    lost = [n for n, t in wanted.items() if n not in stored or stored[n].shape != t.shape]
    if lost:
        raise ModelError(
            "config.json speaks of a reward head whose weights are missing or have another shape",
            where=path,
            got=f"{len(lost)} such tensors, {NAME}.{lost[0]} among them",
            fix="copy the checkpoint again; without the head it is loaded once `reward_head` is "
            "taken out of its config.json",
        )
    head.load_state_dict({name: stored[name].float() for name in wanted})


def _stored_tensors(path: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """The tensors of the safetensors files that hold any of a head."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    place: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    files = {"model.safetensors"}
    if (index := cached_file(path, "model.safetensors.index.json", **place)) is not None:
        files = {
            file
            for name, file in json.loads(Path(index).read_text())["weight_map"].items()
            if name.startswith(f"{NAME}.")
        }
    for file in sorted(files):
        if (found := cached_file(path, file, **place)) is None:
            continue
        with safe_open(found, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.startswith(f"{NAME}."):
                    yield name, tensors.get_tensor(name)
