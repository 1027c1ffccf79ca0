"""The scorer: a model and a plan in, per-token log-probabilities out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmalign.models.families import Family
from mmalign.models.load import base_model
from mmalign.scores import TokenScores
from mmalign.scoring.logps import token_logps
from mmalign.scoring.plan import Plan


class Scorer(nn.Module):
    """Wraps a policy so that one forward call scores a whole plan.

    It is a module so that DDP and FSDP can wrap it: gradients are only synchronised through the
    wrapper's own forward. `model` is a transformers image-text-to-text model or a PeftModel of one.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family

    def forward(self, plan: Plan, *, competitor: bool = False) -> TokenScores:
        """Scores of every candidate of the plan, in candidate order, float32 nats."""
        body, head = body_and_head(self.model)
        hidden = self._hidden(body, plan)
        states = hidden.reshape(-1, hidden.shape[-1])[plan.source]
        logps, competitors = token_logps(
            head,
            states,
            plan.target,
            vocab_size=head.weight.shape[0],
            competitor=competitor,
        )
        return TokenScores(
            logps=_scatter(logps, plan),
            mask=plan.mask,
            competitor_logps=None if competitors is None else _scatter(competitors, plan),
        )

    def _hidden(self, body: nn.Module, plan: Plan) -> Tensor:
        """Last hidden states, [R, S, H]."""
        if plan.layout == "padded":
            return body(
                input_ids=plan.input_ids,
                attention_mask=plan.attention.long(),
                use_cache=False,
                **plan.images,
                **({"mm_token_type_ids": plan.is_image.int()} if self.family.num_axes > 1 else {}),
            ).last_hidden_state
        positions = plan.positions
        assert positions is not None
        extra: dict[str, Any] = {}
        if plan.images:
            encoded = body.get_image_features(**plan.images, return_dict=True)  # type: ignore[operator]
            features = encoded.pooler_output
            encoded.pooler_output = [features[i] for i in plan.image_order.tolist()]
            extra["mm_encoder_outputs"] = {"image": encoded}
        return body(
            input_ids=plan.input_ids,
            attention_mask=self._attention(body, plan.attention),
            position_ids=positions if len(positions) > 1 else positions[0],
            use_cache=False,
            **extra,
        ).last_hidden_state

    def _attention(self, body: nn.Module, allowed: Tensor) -> Tensor:
        """The mask as the attention implementation takes it: bool for SDPA, additive for eager."""
        if body.config._attn_implementation != "eager":  # type: ignore[union-attr]
            return allowed
        dtype = next(body.parameters()).dtype
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def body_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The multimodal body (tokens and pictures to hidden states) and the vocabulary projection."""
    base = base_model(model)
    return base.model, base.get_output_embeddings()


def _scatter(values: Tensor, plan: Plan) -> Tensor:
    """[K] values to [N, T], zero where a candidate has no token."""
    result = values.new_zeros(plan.mask.shape)
    return result.index_put((plan.candidate, plan.offset), values)
