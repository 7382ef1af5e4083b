"""RoBERTa and its relatives as text halves against transformers' own models."""

from pathlib import Path

import pytest
import torch
from transformers import CamembertConfig, PreTrainedConfig, RobertaConfig, XLMRobertaConfig

from tests.checkpoints import (
    EMBEDDING_DIM,
    MAX_TOKENS,
    roberta_config,
    roberta_tokenizer,
    save_dual_encoder,
)
from tests.references import (
    assert_points_lie_in_blocks,
    assert_tower,
    load,
    text_features,
    token_rows,
)

FAMILIES = {"roberta": RobertaConfig, "xlm": XLMRobertaConfig, "camembert": CamembertConfig}


def save(directory: Path, family: type[PreTrainedConfig]) -> Path:
    tokenizer = roberta_tokenizer()
    text = roberta_config(tokenizer, family=family)
    return save_dual_encoder(directory, text=text, tokenizer=tokenizer)


@pytest.mark.parametrize("name", list(FAMILIES))
@torch.inference_mode()
def test_text_tower_equals_transformers(tmp_path: Path, name: str) -> None:
    directory = save(tmp_path, FAMILIES[name])
    model = load(directory)
    ids, is_text = token_rows(first=0, end=2, pad=1, ids=range(4, 40))
    features = text_features(directory, ids, attention_mask=is_text.long())
    assert features.shape[1] == EMBEDDING_DIM
    assert_tower(model.text_tower, ids, features, folder=tmp_path)
    assert_points_lie_in_blocks(model.text_tower)


@torch.inference_mode()
def test_padding_has_no_influence(tmp_path: Path) -> None:
    tower = load(save(tmp_path, XLMRobertaConfig)).text_tower
    ids, is_text = token_rows(first=0, end=2, pad=1, ids=range(4, 40))
    together = tower(ids)
    for row, length in enumerate(is_text.sum(dim=1)):
        alone = tower(ids[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-6)


def test_positions_of_padding_are_no_room_for_tokens(tmp_path: Path) -> None:
    directory = save(tmp_path, XLMRobertaConfig)
    rules = load(directory).token_rules
    assert rules.max_tokens == MAX_TOKENS
    assert rules.special_token_ids == {"pad": 1}
    assert not rules.pads_to_max
