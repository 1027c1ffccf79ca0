"""Loading: what trains, what a reference restores, and what is refused with a sentence."""

import re
import shutil

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForImageTextToText

from mmalign.errors import ModelError
from mmalign.models.families import FAMILIES
from mmalign.models.load import (
    Lora,
    ModelConfig,
    TrainParts,
    load_policy,
    part_of,
    part_table,
    trained_outside_adapter,
)
from mmalign.models.lora import lora_pattern
from mmalign.models.tiny import TinyModel

# Linear layers inside an adapted one.
LORA_PARTS = (".base_layer", ".lora_A.default", ".lora_B.default")


@pytest.fixture(scope="module", params=["llava15", "qwen25vl"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return TinyModel(output=str(folder), family=request.param).build()


def trainable(policy) -> dict[str, bool]:
    return {part.name: part.num_trainable > 0 for part in part_table(policy)}


def test_only_the_language_model_trains_by_default(path):
    policy = load_policy(ModelConfig(path=str(path)))
    assert trainable(policy) == {"vision": False, "projector": False, "language_model": True}
    total = sum(part.num_parameters for part in part_table(policy))
    assert total == sum(p.numel() for p in policy.model.parameters())
    assert all(part.num_parameters > 0 for part in part_table(policy))


def test_parts_are_switched_one_by_one(path):
    parts = TrainParts(vision=False, projector=True, language_model=False)
    policy = load_policy(ModelConfig(path=str(path), train=parts))
    assert trainable(policy) == {"vision": False, "projector": True, "language_model": False}


def test_lora_touches_the_language_model_only(path):
    policy = load_policy(ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8)))
    assert trainable(policy) == {"vision": False, "projector": False, "language_model": True}
    assert trained_outside_adapter(policy.model) == []
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_lora_adapts_every_linear_layer_of_the_language_model_and_no_other(family, tmp_path):
    folder = TinyModel(output=str(tmp_path / family), family=family).build()
    policy = load_policy(ModelConfig(path=str(folder), lora=Lora(rank=2, alpha=4)))
    model = policy.model.get_base_model()
    within = {id(module) for module in model.get_decoder().layers.modules()}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            assert id(module) in within, f"{name} is adapted"
        elif isinstance(module, torch.nn.Linear) and not name.endswith(LORA_PARTS):
            assert id(module) not in within, f"{name} is not adapted"


def test_switching_an_adapter_off_restores_a_projector_that_trains_with_it(path):
    parts = TrainParts(projector=True)
    policy = load_policy(ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8), train=parts))
    assert trainable(policy)["projector"]
    assert trained_outside_adapter(policy.model) == []


def test_what_trains_outside_the_adapter_is_found(path):
    policy = load_policy(ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8)))
    for name, parameter in policy.model.named_parameters():
        if "merger" in name or "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    assert trained_outside_adapter(policy.model)


def test_a_saved_adapter_loads_onto_its_base(path, tmp_path):
    policy = load_policy(ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8)))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    policy.save(tmp_path / "adapter")
    again = load_policy(ModelConfig(path=str(tmp_path / "adapter")))
    base = load_policy(ModelConfig(path=str(path)))
    key = "language_model.layers.0.self_attn.q_proj.weight"
    merged = next(p for n, p in again.model.named_parameters() if n.endswith(key))
    plain = next(p for n, p in base.model.named_parameters() if n.endswith(key))
    assert not torch.allclose(merged, plain)


def test_a_second_adapter_asks_for_a_merge_first(path, tmp_path):
    from mmalign import cli

    config = ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8))
    load_policy(config).save(tmp_path / "adapter")
    again = config.model_copy(update={"path": str(tmp_path / "adapter")})
    with pytest.raises(ModelError, match="mmalign merge"):
        load_policy(again)
    assert cli.run(["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")]) == 0
    load_policy(config.model_copy(update={"path": str(tmp_path / "whole")}))
    assert cli.run(["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")]) == 2


def test_a_saved_policy_is_an_ordinary_checkpoint(path, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    load_policy(ModelConfig(path=str(path))).save(tmp_path / "saved")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(tmp_path / "saved")
    original = AutoModelForImageTextToText.from_pretrained(path)
    for a, b in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_without_config_is_refused_with_the_way_out(path, tmp_path):
    shutil.copytree(path, tmp_path / "run" / "model")
    with pytest.raises(ModelError, match=r"Did you mean .*run/model\?$"):
        load_policy(ModelConfig(path=str(tmp_path / "run")))
    with pytest.raises(ModelError, match="no such folder"):
        load_policy(ModelConfig(path="./nowhere"))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_half_written_weights_are_refused(path, tmp_path, damage):
    shutil.copytree(path, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    with pytest.raises(ModelError, match="half"):
        load_policy(ModelConfig(path=str(tmp_path / "half")))


def test_an_unknown_family_names_the_known_ones(tmp_path):
    from transformers import Blip2Config

    from mmalign.models.families import family_of

    with pytest.raises(ModelError, match=r"llava, .*qwen2_5_vl"):
        family_of(Blip2Config())


def test_a_tensor_that_is_missing_is_no_random_tensor(path, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(path, tmp_path / "lost")
    weights = load_file(path / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.1.self_attn.q_proj.weight"))
    del weights[name]
    save_file(weights, tmp_path / "lost" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing.*q_proj"):
        load_policy(ModelConfig(path=str(tmp_path / "lost")))


def test_an_adapter_that_peft_would_skip_is_refused(path, tmp_path):
    from safetensors.torch import load_file, save_file

    load_policy(ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8))).save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    odd = {name.replace("layers.1.", "layers.7."): t for name, t in load_file(file).items()}
    save_file(odd, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not fit its base"):
        load_policy(ModelConfig(path=str(tmp_path / "a")))


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("projector", [False, True])
def test_parts_trained_beside_lora_are_those_asked_for_and_load_again(
    path, tmp_path, vision, projector
):
    parts = TrainParts(vision=vision, projector=projector)
    config = ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8), train=parts)
    policy = load_policy(config)
    wanted = {"vision": vision, "projector": projector, "language_model": True}
    assert trainable(policy) == wanted
    policy.save(tmp_path / "a")
    load_policy(ModelConfig(path=str(tmp_path / "a")))


def test_layer_names_mean_the_language_models(path):
    lora = Lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))
    policy = load_policy(ModelConfig(path=str(path), lora=lora))
    assert trainable(policy) == {"vision": False, "projector": False, "language_model": True}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_layer_names_mean_the_language_models_in_every_family(family, tmp_path):
    path = TinyModel(output=str(tmp_path / "m"), family=family.name).build()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    pattern = lora_pattern(Lora(rank=4, alpha=8, targets=("q_proj",)), family)
    hit = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert len(hit) == model.config.get_text_config().num_hidden_layers
    assert {part_of(name, family) for name in hit} == {"language_model"}


def test_lora_mistakes_are_sentences(path, tmp_path):
    lora = Lora(rank=4, alpha=8, targets=("nothing_like_it",))
    with pytest.raises(ModelError, match="finds nothing to adapt"):
        load_policy(ModelConfig(path=str(path), lora=lora))
    with pytest.raises(ModelError, match="holds no adapter"):
        load_policy(ModelConfig(path=str(path), adapter=str(tmp_path)))


def test_an_adapter_is_merged_in_float32_only(path, tmp_path):
    load_policy(ModelConfig(path=str(path), lora=Lora(rank=4, alpha=8))).save(tmp_path / "a")
    with pytest.raises(ModelError, match="merged in float32"):
        load_policy(ModelConfig(path=str(tmp_path / "a"), dtype="bfloat16"))
    load_policy(ModelConfig(path=str(tmp_path / "a"), dtype="bfloat16"), merge=False)


def test_another_vision_tower_is_another_family():
    from transformers import LlavaConfig, SiglipVisionConfig

    from mmalign.models.families import family_of

    with pytest.raises(ModelError, match="siglip_vision_model"):
        family_of(LlavaConfig(vision_config=SiglipVisionConfig()))
