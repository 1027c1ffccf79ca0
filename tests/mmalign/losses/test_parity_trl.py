"""Losses against TRL's own on the same tensors: value and gradient."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from mmalign.losses import DPO
from mmalign.losses.base import totals_of
from mmalign.losses.rollout import DAPO, GRPO, GSPO, DrGRPO
from mmalign.scores import PairTable, RolloutTable, RolloutTotals, TokenScores

trl = pytest.importorskip("trl")


class Fixed(torch.nn.Module):
    """A 'model' whose logits are given, to drive TRL's own loss code."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.config = SimpleNamespace(model_type="fixed", output_router_logits=False)
        self.warnings_issued: dict = {}

    def forward(self, **kwargs):
        return SimpleNamespace(logits=self.logits * 1.0, aux_loss=None)


def test_dpo_equals_trl(tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    from mmalign.models.tiny import TinyModel

    words = tuple(f"w{i}" for i in range(40))
    path = TinyModel(output=str(tmp_path / "tiny"), words=words).build()
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    rows = [
        {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6 w7", "rejected": " w8 w9"},
        {"prompt": "w3", "chosen": " w2", "rejected": " w30 w31 w32 w33 w34"},
    ]
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path / "out"), beta=0.3, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(torch.utils.data.DataLoader(
        trainer.train_dataset, batch_size=2, collate_fn=trainer.data_collator
    )))  # fmt: skip
    trl_loss = trainer.compute_loss(trainer.model, dict(batch))
    trl_loss.backward()
    trl_gradient = policy.lm_head.weight.grad.clone()

    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()

    def score(model) -> TokenScores:
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return TokenScores(logps=logps * mask, mask=mask)

    policy.zero_grad()
    table = PairTable(chosen=torch.tensor([0, 1]), rejected=torch.tensor([2, 3]))
    scores = score(policy)
    with torch.no_grad():
        reference_scores = score(reference)
    out = DPO(beta=0.3)(scores, reference_scores, table, totals_of(scores, table))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(trl_loss.item(), abs=1e-6)
    assert torch.allclose(policy.lm_head.weight.grad, trl_gradient, atol=1e-7)


@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize(
    ("kind", "loss_type", "level", "clips"),
    [
        (GRPO, "grpo", "token", (0.2, 0.2)),
        (DrGRPO, "dr_grpo", "token", (0.2, 0.2)),
        (DAPO, "dapo", "token", (0.2, 0.28)),
        (GSPO, "grpo", "sequence", (3e-4, 4e-4)),
        (GSPO, "grpo", "sequence", (0.1, 0.15)),
    ],
)
def test_rollout_losses_equal_trls(kind, loss_type, level, clips, dual_clip, kl_weight):
    """GRPOTrainer's own loss, called with given scores in the model's place.

    Advantages are given too: TRL adds 1e-4 to the standard deviation, where ours adds 1e-6.
    """
    from trl import GRPOTrainer

    low, high = clips
    torch.manual_seed(0)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 1, 3])[:, None]
    old = -torch.rand(4, 5) * mask
    logps = (old + 0.6 * torch.randn(4, 5) * mask).requires_grad_()
    reference = (old + 0.3 * torch.randn(4, 5)) * mask
    advantages = torch.tensor([0.7, -0.7, -1.2, 0.4])

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros(4, 5), None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False,
        use_vllm=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        importance_sampling_level=level, loss_type=loss_type, beta=kl_weight,
        epsilon_low=low, epsilon_high=high, max_completion_length=16,
        args=SimpleNamespace(delta=dual_clip, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda it: it, reduce=lambda it, reduction: it
        ),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(4, 1), "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 5), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old,
        "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    (their_gradient,) = torch.autograd.grad(theirs, logps)

    loss = kind(clip_low=low, clip_high=high, dual_clip=dual_clip, kl_weight=kl_weight)
    ours = loss(
        TokenScores(logps=logps, mask=mask),
        TokenScores(logps=reference, mask=mask),
        RolloutTable(advantages=advantages, old_logps=old, group=torch.tensor([0, 0, 1, 1])),
        RolloutTotals(num_rollouts=4, num_tokens=int(mask.sum()), max_tokens=16),
    )
    (gradient,) = torch.autograd.grad(ours.loss, logps)
    assert ours.loss.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert torch.allclose(gradient, their_gradient, atol=1e-7)
