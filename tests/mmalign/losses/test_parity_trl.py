"""DPO against TRL's DPOTrainer on the same tensors: value and gradient."""

from types import SimpleNamespace

import pytest
import torch

from mmalign.losses import DPO
from mmalign.losses.base import totals_of
from mmalign.scores import PairTable, TokenScores

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
