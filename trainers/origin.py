"""Which weights a run starts from: written down always, and checked where the recipe says so.

A method in stages has its own start for each: SPECS's cold start trains the base model on what a
short-RL version of it has said, and starting from that version instead would go unseen.
"""

from __future__ import annotations

from accelerate import Accelerator

from mmalign.errors import TrainingError
from mmalign.log import get_logger
from mmalign.models.load import ModelConfig, Policy, load_policy, resolve_adapter
from mmalign.models.reward_head import NAME
from trainers.config import HASH_PREFIX, Recipe
from trainers.reference_key import place_of, starting_weights, tensors_hash
from trainers.together import from_first

logger = get_logger("trainers.origin")


def origin_of(recipe: Recipe, policy: Policy, accelerator: Accelerator) -> str:
    """The hash of the weights that the policy has before it trains, on every process.

    Raises TrainingError where they are not those of `recipe.start_from`.
    """
    return from_first(accelerator, lambda: _checked(recipe, policy))


def _checked(recipe: Recipe, policy: Policy) -> str:
    found, start = origin_hash(policy), recipe.start_from
    if start is None:
        return found
    by_hash = start.startswith(HASH_PREFIX)
    wanted = start if by_hash else _hash_of(start, recipe, found)
    if found != wanted:
        raise TrainingError(
            "training must start from other weights, by start_from",
            where=f"model.path={recipe.model.path}",
            got=found,
            wanted=wanted if by_hash else f"{wanted}, of {start}",
            fix="set model.path to the checkpoint whose run told that hash in its start.json, or "
            "drop start_from if these weights are meant"
            if by_hash
            else f"set model.path={start}, or drop start_from if these weights are meant",
        )
    logger.info("starting from the weights of %s, %s", start, found)
    return found


def origin_hash(policy: Policy) -> str:
    """A hash of every starting weight as float32: 16-bit weights have it in any dtype that holds
    them. A fresh adapter does not count, and a reward head neither.
    """
    counted = starting_weights(policy.model)
    told = {name: tensor for name, tensor in counted.items() if NAME not in name}
    return HASH_PREFIX + tensors_hash(told, widened=True)


def _hash_of(start: str, recipe: Recipe, found: str) -> str:
    """The hash of a checkpoint; it is not loaded where it is the very one that the policy is."""
    config = ModelConfig(path=start)
    if _places(config) == _places(recipe.model):
        return found
    kept = {"lora": None, "adapter": None, "reward_head": None, "revision": None, "path": start}
    logger.info("loading %s, to compare its weights with those of %s", start, recipe.model.path)
    return origin_hash(load_policy(recipe.model.model_copy(update=kept)))


def _places(config: ModelConfig) -> list[str]:
    return [place_of(path) for path in resolve_adapter(config) if path is not None]
