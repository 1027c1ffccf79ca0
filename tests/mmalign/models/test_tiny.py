"""The small models: reproducible, and never written over one another."""

import pytest

from mmalign.errors import ModelError
from mmalign.models.tiny import TinyModel


def test_a_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    def weights(name: str, seed: int) -> bytes:
        folder = TinyModel(output=str(tmp_path / name), seed=seed).build()
        return (folder / "model.safetensors").read_bytes()

    assert weights("a", 0) == weights("b", 0)
    assert weights("a", 0) != weights("c", 1)


def test_a_second_build_leaves_the_model_alone_and_other_settings_are_refused(tmp_path):
    config = TinyModel(output=str(tmp_path / "m"))
    file = config.build() / "model.safetensors"
    before = file.stat().st_mtime_ns
    config.build()
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ModelError, match="other settings"):
        config.model_copy(update={"seed": 1}).build()
    assert file.stat().st_mtime_ns == before


def test_building_does_not_move_the_callers_random_numbers(tmp_path):
    import torch

    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    TinyModel(output=str(tmp_path / "m")).build()
    assert torch.equal(torch.rand(1), wanted)
