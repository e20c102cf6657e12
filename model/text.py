"""The text encoder: transformers' CLIP text tower, which may also know learned tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from model.config import TextConfig
from model.errors import UserError


class TextEncoder(nn.Module):
    """Token numbers to embeddings; `clip` is transformers' own module, under its own names.

    A learned token is a row (or several) behind the end of the embedding table, for as long as a block of `learned`
    lasts; the table itself never changes.
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

    @contextmanager
    def learned(self, vectors: Tensor) -> Iterator[list[int]]:
        """Within the block, n more tokens are known, whose embeddings are `vectors` (n, d); gives their numbers.

        An `nn.Parameter` is used as it is, so that gradients reach it, and of all the table it alone. Blocks nest.

        Raises:
            UserError: the vectors have another width than this encoder's.
        """
        embeddings = self.clip.embeddings
        table = embeddings.token_embedding
        width = self.config.hidden_size
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise UserError(f"a learned token must be (n, {width}), not {tuple(vectors.shape)}")
        first = table.num_embeddings
        embeddings.token_embedding = LongerTable(table, vectors)
        try:
            yield list(range(first, first + len(vectors)))
        finally:
            embeddings.token_embedding = table


class LongerTable(nn.Module):
    """An embedding table that goes on: below its former end it is `table`, behind it are `vectors` (n, d)."""

    def __init__(self, table: nn.Module, vectors: Tensor) -> None:
        super().__init__()
        self.table = table
        if not isinstance(vectors, nn.Parameter):
            vectors = nn.Parameter(vectors.to(next(table.parameters()).device), requires_grad=False)
        self.vectors = vectors
        self.former: int = table.num_embeddings  # type: ignore[assignment]
        self.num_embeddings = self.former + len(vectors)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (...) of integers -> (..., d), in the dtype of the former table."""
        known = self.table(tokens.clamp(max=self.former - 1))
        learned = functional.embedding((tokens - self.former).clamp(min=0), self.vectors)
        return torch.where((tokens >= self.former)[..., None], learned.to(known.dtype), known)
