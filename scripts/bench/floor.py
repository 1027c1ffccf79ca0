"""Operations of the cheapest exact step, from the model's sizes and a batch's tokens."""

from __future__ import annotations

from torch import nn

from mmalign.models.load import Policy, base_model
from mmalign.scoring.candidates import CandidateBatch
from mmalign.scoring.cost import model_cost

# Of a layer, what even unread tokens go through; and adapters, which `cost.token` leaves out.
NOT_REST = ("k_proj", "v_proj", "lora_")


def floor_of(policy: Policy, batch: CandidateBatch, *, reference: bool = False) -> float:
    """Multiplications and additions of a step with a frozen tower that does nothing twice.

    Each distinct token goes once through the language model, each picture once through the tower,
    response positions alone to the vocabulary. Of the last layer, a prompt's tokens before its last
    one make keys and values alone. A backward pass is twice a forward one, and once
    in linear layers that get no gradient, as under an adapter.
    reference: with a forward pass of language model and vocabulary for the reference, which takes
        the pictures from the policy.
    """
    base = base_model(policy.model)
    cost = model_cost(policy.model, policy.family)
    config = base.config.get_text_config()
    rest = sum(
        module.weight.numel()
        for name, module in base.get_decoder().layers[-1].named_modules()
        if isinstance(module, nn.Linear) and not any(w in name for w in NOT_REST)
    )
    pairs = tokens = answers = unread = 0
    for number, condition in enumerate(batch.conditions):
        own = [len(c.response_ids) for c in batch.candidates if c.condition == number]
        prompt = len(condition.prompt_ids)
        tokens += prompt + sum(own)
        answers += sum(own)
        unread += prompt - 1
        pairs += prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in own)
    patches = {one.key: one.num_tokens for c in batch.conditions for one in c.images}
    linear = tokens * cost.token - 2 * rest * unread
    linear += 2 * config.hidden_size * config.vocab_size * answers
    seeing = pairs * cost.pair
    vision = base.config.vision_config
    # Tower and projector, and attention over a picture's patches and its class token.
    side = vision.image_size // vision.patch_size
    seen = sum(
        4 * vision.num_hidden_layers * vision.hidden_size * (side**2 + 1) ** 2 for _ in patches
    )
    adapted = base is not policy.model
    trained = (2 if adapted else 3) * linear + 3 * seeing
    extra = linear + seeing if reference else 0
    return trained + extra + sum(patches.values()) * cost.patch + seen
