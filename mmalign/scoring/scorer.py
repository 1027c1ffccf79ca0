"""The scorer: a model and a plan in, per-token log-probabilities out."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from mmalign.attention.choose import MASKED, Attention, sliding_window
from mmalign.attention.interface import install
from mmalign.errors import ModelError
from mmalign.models.families import Family
from mmalign.models.lean import make_lean
from mmalign.models.load import base_model
from mmalign.models.reward_head import head_of, rewards_of
from mmalign.models.unread import skip_unread
from mmalign.scores import Distributions, TokenScores
from mmalign.scoring.blank import (
    NO_BLANK,
    Blank,
    counted_as_nothing,
    image_features,
    video_features,
)
from mmalign.scoring.candidates import EncodedMedia, Features
from mmalign.scoring.features import features_of, joined_features, without_pixels
from mmalign.scoring.logps import token_logps, token_logps_and_kl
from mmalign.scoring.plan import Plan


class Scorer(nn.Module):
    """Wraps a policy so that one forward call scores a whole plan.

    It is a module so that DDP and FSDP can wrap it: gradients are only synchronised through the
    wrapper's own forward. `model` is a transformers image-text-to-text model or a PeftModel of one.
    attention: how packed rows attend; without one, plans must not be packed.
    blank: what the tower sees for a plan without pictures or clips, so that it runs for each.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        attention: Attention = MASKED,
        blank: Blank = NO_BLANK,
    ) -> None:
        super().__init__()
        self.blank = blank
        self.model = model
        self.family = family
        self.attention = attention
        if attention.packs:
            install(base_model(model).get_decoder())
            make_lean(base_model(model).get_decoder())
            skip_unread(base_model(model).get_decoder())

    def forward(
        self,
        plan: Plan | EncodedMedia,
        *,
        competitor: bool = False,
        distributions: bool = False,
        rewards: bool = False,
        against: Distributions | None = None,
        kl_of: Tensor | None = None,
    ) -> TokenScores | Features:
        """Scores of every candidate of the plan, in candidate order, float32 nats.

        Given a picture instead of a plan: its features, in the dtype that the model makes them in.
        They are asked for here because wrapped weights are whole in `forward` alone.

        competitor, distributions, rewards: also give TokenScores' fields of these names; rewards
            take a model with a reward head.
        against: the reference's distributions over the same plan; then `kl` is given for the
            candidates numbered in `kl_of`, [C] int64.
        """
        body, head = body_and_head(self.model)
        if isinstance(plan, EncodedMedia):
            return features_of(image_features(body, plan.inputs))
        hidden = self._hidden(body, plan)
        states = hidden.reshape(-1, hidden.shape[-1])[plan.source]
        competitors = kl = None
        if against is None:
            logps, competitors = token_logps(
                head,
                states,
                plan.target,
                vocab_size=head.out_features,
                competitor=competitor,
            )
        else:
            assert kl_of is not None
            assert not competitor
            logps, kl = self._with_kl(head, states, plan, against, kl_of)
        return TokenScores(
            logps=_scatter(logps, plan),
            mask=plan.mask,
            marked=plan.marked,
            competitor_logps=None if competitors is None else _scatter(competitors, plan),
            kl=None if kl is None else _scatter(kl, plan),
            rewards=self._rewards(hidden, plan) if rewards else None,
            distributions=self._distributions(head, states) if distributions else None,
        )

    def rewards(self, plan: Plan) -> Tensor:
        """Only the rewards of the plan's candidates, [N] float32: no vocabulary, for inference.

        Not for a wrapped scorer, which synchronises its weights in `forward` alone.
        """
        body, _ = body_and_head(self.model)
        return self._rewards(self._hidden(body, plan), plan)

    def _rewards(self, hidden: Tensor, plan: Plan) -> Tensor:
        head = head_of(base_model(self.model))
        assert head is not None
        return rewards_of(head, hidden.reshape(-1, hidden.shape[-1])[plan.last])

    def _with_kl(
        self, head: Any, states: Tensor, plan: Plan, against: Distributions, kl_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of every response token, and the KL at those of `kl_of`: [K] each."""
        measured = torch.isin(plan.candidate, kl_of)
        here, elsewhere = measured.nonzero().squeeze(-1), (~measured).nonzero().squeeze(-1)
        size = head.out_features  # The weight has no shape while ZeRO-3 keeps it in pieces.
        own, kl = token_logps_and_kl(
            head,
            states[here],
            plan.target[here],
            reference_head=against.head or _without_adapter(head),
            reference_hidden=against.states[here],
            vocab_size=size,
        )
        other, _ = token_logps(head, states[elsewhere], plan.target[elsewhere], vocab_size=size)
        logps = own.new_zeros(len(states)).index_put((here,), own).index_put((elsewhere,), other)
        return logps, kl.new_zeros(len(states)).index_put((here,), kl)

    def _distributions(self, head: nn.Module, states: Tensor) -> Distributions:
        # A policy with an adapter is its own reference, and its head has to be used inside its
        # own forward: under FSDP the weights are whole only there.
        own = hasattr(self.model, "peft_config")
        return Distributions(states=states, head=None if own else head)

    def _hidden(self, body: nn.Module, plan: Plan) -> Tensor:
        """Last hidden states, [R, S, H]."""
        if plan.layout == "padded":
            assert plan.attention is not None
            media: dict[str, Any] = {**plan.images, **plan.videos}
            if plan.features:
                # The model refuses pixels beside features, also where they are of clips.
                encoded, nothing = self._encoded(body, plan)
                media = without_pixels(media) | {"mm_encoder_outputs": encoded}
            else:
                nothing = self._blank_images(body, plan) + self._blank_videos(body, plan)
            hidden = body(
                input_ids=plan.input_ids,
                attention_mask=plan.attention.long(),
                use_cache=False,
                **media,
                **self._token_types(plan),
            ).last_hidden_state
            return sum(nothing, hidden)
        positions = plan.positions
        assert positions is not None
        encoded, nothing = self._encoded(body, plan)
        hidden = body(
            input_ids=plan.input_ids,
            position_ids=positions if len(positions) > 1 else positions[0],
            use_cache=False,
            **self._attention(body, plan),
            **({"mm_encoder_outputs": encoded} if encoded else {}),
        ).last_hidden_state
        return sum(nothing, hidden)

    def _encoded(self, body: Any, plan: Plan) -> tuple[dict[str, Any], list[Tensor]]:
        """Features of pictures and clips in the order of their places, and what blanks add.

        The tower runs on what has no features yet: before the language model, so that every
        process meets the tower's layers first, and last in the backward pass.
        """
        encoded: dict[str, Any] = {}
        if plan.features:
            encoded["image"] = _in_order(joined_features(plan.features), plan.image_order)
        elif plan.images:
            encoded["image"] = _in_order(image_features(body, plan.images), plan.image_order)
        nothing = self._blank_images(body, plan)
        if plan.videos:
            encoded["video"] = _in_order(video_features(body, plan.videos), plan.video_order)
        return encoded, nothing + self._blank_videos(body, plan)

    def _blank_images(self, body: Any, plan: Plan) -> list[Tensor]:
        if plan.images or plan.features or not self.blank.images:
            return []
        return [counted_as_nothing(image_features(body, self.blank.images))]

    def _blank_videos(self, body: Any, plan: Plan) -> list[Tensor]:
        if plan.videos or not self.blank.videos:
            return []
        return [counted_as_nothing(video_features(body, self.blank.videos))]

    def _token_types(self, plan: Plan) -> dict[str, Tensor]:
        if self.family.token_types is None:
            return {}
        kinds = plan.is_image.int() + 2 * plan.is_video.int()
        return self.family.token_types(kinds, plan.is_response)

    def _attention(self, body: nn.Module, plan: Plan) -> dict[str, Any]:
        """What tells the layers who sees whom: a tree's attention, or a mask for each kind."""
        if plan.tree is not None:
            assert self.attention.packed is not None, "the plan is packed, the attention is not"
            # transformers passes a mask of four dimensions on as it is, and `attend` reads none.
            unread = plan.is_image.new_ones(1, 1, 1, 1)
            packed = self.attention.packed(plan.tree)
            read = torch.unique(torch.cat([plan.source, plan.last]))
            return {"attention_mask": unread, "packed": packed, "read": read}
        assert plan.attention is not None
        mask = self._as_taken(body, plan.attention)
        if plan.windowed is None:
            if sliding_window(body.config.get_text_config()) is not None:  # type: ignore[union-attr]
                raise ModelError(
                    "the plan knows nothing of the model's layers with a sliding window",
                    fix="give make_plan window=sliding_window(text_config)",
                )
            return {"attention_mask": mask}
        windowed = self._as_taken(body, plan.windowed)
        return {"attention_mask": {"full_attention": mask, "sliding_attention": windowed}}

    def _as_taken(self, body: nn.Module, allowed: Tensor) -> Tensor:
        """The mask as the attention implementation takes it: bool for SDPA, additive for eager."""
        if body.config._attn_implementation != "eager":  # type: ignore[union-attr]
            return allowed
        dtype = next(body.parameters()).dtype
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def body_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The multimodal body (tokens and pictures to hidden states) and the vocabulary projection."""
    base = base_model(model)
    return base.model, base.get_output_embeddings()


def _in_order(encoded: Any, order: Tensor) -> Any:
    """The tower's output with its features repeated and put into the order of the places."""
    encoded.pooler_output = _taken(encoded.pooler_output, order)
    # Qwen3-VL's features for the first layers of the language model, one set for each layer.
    if (deeper := encoded.get("deepstack_features")) is not None:
        encoded["deepstack_features"] = [_taken(features, order) for features in deeper]
    return encoded


def _taken(features: Any, order: Tensor) -> Any:
    """Rows of a tensor, or items of a sequence with one tensor for each picture."""
    if isinstance(features, Tensor):
        return features[order]
    return [features[i] for i in order.tolist()]


def _without_adapter(head: nn.Module) -> nn.Module:
    """The vocabulary projection as it was before training, of a model with an adapter."""
    if isinstance(head, AuxiliaryTrainingWrapper):
        return head.original_module  # type: ignore[return-value]
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head  # type: ignore[return-value]


def _scatter(values: Tensor, plan: Plan) -> Tensor:
    """[K] values to [N, T], zero where a candidate has no token."""
    result = values.new_zeros(plan.mask.shape)
    return result.index_put((plan.candidate, plan.offset), values)
