"""config.json of published models: each is read, and has exactly the parameters its checkpoint holds."""

import json
import math
from pathlib import Path

import jax
import pytest

from xtoken_jax.models import DecoderConfig, Model

FOLDER = Path(__file__).parents[1] / "fixtures" / "hf_configs"

# Elements of the published safetensors, tied embeddings counted once. Gemma 3 4B's text half is its
# 4,300,079,472 less the vision tower's 416,866,032 and the projector's 2,950,272.
PARAMETERS = {
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b_v0_1": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "phi4_mini": 3_836_021_760,
    "qwen2_5_0_5b": 494_032_768,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
}


def test_every_config_has_its_count():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_config_gives_the_published_number_of_parameters(name):
    config = DecoderConfig.from_hf(json.loads((FOLDER / f"{name}.json").read_text()))
    leaves = jax.tree.leaves(Model(config).abstract())
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]
