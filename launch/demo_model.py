"""A small GPT in plain PyTorch, up to the hidden states that a language model's head turns into a loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, H]`` to ``[B, L, H]``."""
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [B, heads, L, H / heads] each
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Token ids ``[B, L]`` to hidden states ``[B, L, H]``, of which each sees only the tokens up to its own."""

    def __init__(self, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_length: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.blocks = nn.Sequential(*(Block(hidden_size, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(hidden_size)
        # Tokens far above positions: the loss then does not rest at what token frequencies alone can reach.
        nn.init.normal_(self.token_embedding.weight, std=0.3)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.norm(self.blocks(self.token_embedding(tokens) + self.position_embedding(positions)))


class FullLogitsCrossEntropy(nn.Module):
    """The ordinary head, initialised as ``nn.Linear`` is: all logits ``[B, L, V]`` are stored, then make the loss."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden_size, vocab_size, bias=False).weight

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, self.weight).flatten(0, -2), target.flatten())
