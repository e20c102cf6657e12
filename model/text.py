"""The text encoder: transformers' CLIP text tower, which may also know learned tokens."""

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from model.config import TextConfig
from model.errors import UserError


class TextEncoder(nn.Module):
    """Token numbers to embeddings; `clip` is transformers' own module, under its own names.

    A learned token is a row (or several) appended to the embedding table: its number is what `add_token` returns, and
    nothing else of the table moves.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.max_position_embeddings,
                hidden_act=config.hidden_act,
                # CLIP's vocabulary ends with its start and its end token; only its pooled output asks for them
                bos_token_id=config.vocab_size - 2,
                eos_token_id=config.vocab_size - 1,
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b, n) of integers -> (b, n, d): the last hidden state behind the final LayerNorm."""
        return self.clip(input_ids=tokens).last_hidden_state

    def add_token(self, vectors: Tensor) -> list[int]:
        """Append learned embeddings (n, d) and return the n token numbers they are reached by.

        Raises:
            UserError: the vectors have another width than this encoder's.
        """
        table = self.clip.embeddings.token_embedding
        if vectors.ndim != 2 or vectors.shape[1] != table.embedding_dim:
            raise UserError(f"a learned token must be (n, {table.embedding_dim}), not {tuple(vectors.shape)}")
        first = table.num_embeddings
        grown = torch.cat([table.weight.detach(), vectors.to(table.weight)])
        self.clip.embeddings.token_embedding = nn.Embedding.from_pretrained(
            grown, freeze=not table.weight.requires_grad
        )
        return list(range(first, first + len(vectors)))
