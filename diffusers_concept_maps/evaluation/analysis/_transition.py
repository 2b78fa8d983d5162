"""The second-largest eigenvalue modulus of an attention matrix that is never formed.

The softmax of query and key is row-stochastic: 1 is its largest eigenvalue, with the constant vector, and the modulus
of the next says how slowly a random walk along attention forgets where it began. The matrix is not symmetric, so its
eigenvalues may be complex pairs: orthogonal iteration carries a block of vectors, and a small Rayleigh-Ritz projection
takes the eigenvalues out of it (Stewart, "Simultaneous iteration for computing invariant subspaces of non-Hermitian
matrices", Numerische Mathematik 25, 1976).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

TOLERANCE, ITERATIONS = 1e-4, 300
"""Where the iteration stops: residual norm of the pair, and the most products with the block."""
SMALLEST_BLOCK = 4
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
"""The backends that never form the matrix."""


@dataclass(frozen=True)
class Transition:
    """Attention between the tokens of one layer, as a matrix to multiply with.

    Attributes:
        query: `[H, N, D]`, after norms and rotary embedding.
        key: likewise.
        mask: `[H or 1, N or 1, N]`, bool or what is added to the logits; None hides nothing.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None = None

    def apply(self, vectors: torch.Tensor) -> torch.Tensor:
        """`softmax(query key^T / D^0.5) vectors`, in column blocks of the width of a head.

        Args:
            vectors: `[H, N, b]`, in the dtype of the query.

        Returns:
            `[H, N, b]`.
        """
        width, blocks = self.query.shape[-1], []
        mask = None if self.mask is None else self.mask[None]
        with sdpa_kernel(_FUSED):
            for block in vectors.split(width, -1):
                # Only values as wide as the keys, row by row, are taken by the kernels that form no matrix.
                values = pad(block, (0, width - block.shape[-1])).contiguous()
                product = scaled_dot_product_attention(self.query[None], self.key[None], values[None], attn_mask=mask)
                blocks.append(product[0, ..., : block.shape[-1]])
        return torch.cat(blocks, -1)


@dataclass(frozen=True)
class SecondEigenvalue:
    """What the iteration has found, for every matrix.

    Attributes:
        modulus: float64 `[M]`, of the eigenvalue that is second by modulus; 0 for a single token.
        residual: float64 `[M]`, the norm of `A u - value u` of the Ritz pair, u being of norm 1. The error of the
            eigenvalue is about the residual times its condition number, which is 1 for symmetric matrices only.
        iterations: number of products with the block that were made.
        converged: bool `[M]`, whether the residual is within the tolerance.
    """

    modulus: torch.Tensor
    residual: torch.Tensor
    iterations: int
    converged: torch.Tensor


@torch.no_grad()
def second_eigenvalue(
    transition: Transition,
    *,
    matrix: str = "head",
    block: int | None = None,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> SecondEigenvalue:
    """The second-largest eigenvalue modulus of attention, matrix-free, by block subspace iteration.

    Args:
        transition: attention of one layer with H heads of width D over N tokens.
        matrix: "head": one matrix for each head (M = H); "mean": their mean (M = 1), applied as the mean of products.
        block: vectors that are carried, at least 4; None is D, which costs attention no more than fewer would. The
            next eigenvalue that is not in the block decides how fast it converges.
        tolerance: the largest residual that ends the iteration.
        iterations: the most products with the block.
        seed: of the vectors to begin with.

    Raises:
        ConceptMapsValueError: an unknown matrix, or a block, tolerance or number that cannot be used.
        ConceptMapsError: rows that are all masked or overflow, so that the matrix has no values.
    """
    heads, tokens, width = transition.query.shape
    _check(matrix, block, tolerance, iterations)
    columns = min(max(width, SMALLEST_BLOCK) if block is None else block, tokens)
    count = heads if matrix == "head" else 1
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(count, tokens, columns, generator=generator, dtype=torch.float64).to(transition.query)
    start[..., 0] = 1  # the eigenvector of 1
    basis = torch.linalg.qr(start).Q
    made, residual = 0, torch.tensor(torch.inf)
    while made < iterations and not bool((residual <= tolerance).all()):
        product = _multiply(transition, basis, matrix)
        modulus, residual = _ritz(basis, product)
        basis = torch.linalg.qr(product).Q
        made += 1
    return SecondEigenvalue(modulus, residual, made, residual <= tolerance)


def _check(matrix: str, block: int | None, tolerance: float, iterations: int) -> None:
    if matrix not in ("head", "mean"):
        raise ConceptMapsValueError(f"unknown matrix {matrix!r}; expected 'head' or 'mean'")
    if block is not None and block < SMALLEST_BLOCK:
        raise ConceptMapsValueError(
            f"block is {block}; expected at least {SMALLEST_BLOCK}, so that complex pairs fit in beside 1"
        )
    if not tolerance > 0 or iterations < 1:
        raise ConceptMapsValueError(
            f"tolerance {tolerance} with {iterations} iterations; expected a tolerance above 0 and at least 1"
        )


def _multiply(transition: Transition, basis: torch.Tensor, matrix: str) -> torch.Tensor:
    if matrix == "head":
        product = transition.apply(basis)
    else:
        product = transition.apply(basis.expand(len(transition.query), -1, -1)).mean(0, keepdim=True)
    if not bool(product.isfinite().all()):
        raise ConceptMapsError("attention has rows without a value; a query whose keys are all masked, or an overflow")
    return product


def _ritz(basis: torch.Tensor, product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Modulus and residual of the second Ritz pair `[M]`, from the basis `[M, N, b]` and its product."""
    if basis.shape[1] == 1:
        nothing = torch.zeros(len(basis), dtype=torch.float64)
        return nothing, nothing
    wide, moved = basis.double(), product.double()
    values, vectors = torch.linalg.eig((wide.mT @ moved).cpu())  # [M, b], [M, b, b]
    second = values.abs().argsort(descending=True)[:, 1]
    each = torch.arange(len(values))
    value, vector = values[each, second], vectors[each, :, second, None].to(basis.device)
    gap = moved.to(vector.dtype) @ vector - value[:, None, None].to(vector) * (wide.to(vector.dtype) @ vector)
    return value.abs(), gap[..., 0].norm(dim=-1).cpu()
