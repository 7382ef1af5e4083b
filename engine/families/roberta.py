"""RoBERTa, XLM-RoBERTa and CamemBERT as text backbones: the text half of multilingual CLIPs.

Knows where RoBERTa differs from BERT: its first position, and with it the longest text.

Source: Liu et al. 2019 (arXiv 1907.11692), Conneau et al. 2019 (arXiv 1911.02116); positions as
in transformers' `modeling_xlm_roberta.py`.
"""

from engine.families import bert


class TextBackbone(bert.TextBackbone):
    """RoBERTa with its pooler: int32 [N, T], padded at the end with `pad_token_id` -> [N, width].

    Its config is a `RobertaConfig`, `XLMRobertaConfig` or `CamembertConfig`.
    """

    def _first_position(self) -> int:
        # fairseq's table: the rows up to that of the padding's id are no positions.
        return int(self.pad_token_id) + 1
