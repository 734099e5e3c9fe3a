"""FLOPs of the matrix products of neural_field and its backward, two per multiply-add.

The backward's own products are counted, not those by which a kernel computes the states again. So the numbers are those of the
formula, whatever backend runs it: model FLOPs in the sense of PaLM (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["backward_flops", "forward_flops"]

Shape = Sequence[int]


def _products(x: Shape, weights: Shape, embed_weight: Shape, patch_size: int, ratio: int) -> tuple[int, int, int]:
    """Multiply-adds between codes and states of all pixels, of the table of cosine features, and of one generated layer."""
    batch, channels, height, width = x
    hidden, features = embed_weight
    pixels = batch * height * width
    # All patches have the same cosine features: their product is made once.
    table = patch_size**2 * (features - channels) * hidden
    return pixels * channels * hidden, table, pixels * ratio * hidden**2


def forward_flops(
    x: Shape, weights: Shape, embed_weight: Shape, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias,
    patch_size: int, mlp_ratio: int, *options,
) -> int:  # fmt: skip
    """FLOPs of the forward: the embedding, two products per block, the output layer."""
    ends, table, layer = _products(x, weights, embed_weight, patch_size, mlp_ratio)
    return 2 * (2 * ends + table + 2 * layer * weights[2])


def backward_flops(
    grad: Shape, x: Shape, weights: Shape, embed_weight: Shape, embed_bias, norm_weight, out_norm_weight, out_weight, out_bias,
    patch_size: int, mlp_ratio: int, eps: float, normalise: str, form: str, needs: Sequence[bool], backend: str,
) -> int:  # fmt: skip
    """FLOPs of the gradients that are needed."""
    ends, table, layer = _products(x, weights, embed_weight, patch_size, mlp_ratio)
    need_x, need_weights, need_embed, need_bias, need_norm, _, need_out, _ = needs
    depth = weights[2]
    below = need_x or need_embed or need_bias or need_norm
    total = ends * (need_x + need_embed + need_out + any(needs[:6])) + table * need_embed
    # Per block: two gradients of generated layers, and the gradient of the state through the second layer and the first.
    total += layer * depth * (2 * need_weights + (below or need_weights))
    total += layer * (depth if below else max(0, depth - 1) if need_weights else 0)
    return 2 * total
