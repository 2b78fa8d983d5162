"""The second-largest eigenvalue modulus, against `torch.linalg.eigvals` of matrices that are formed in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_concept_maps import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.analysis import _transition
from diffusers_concept_maps.evaluation.analysis._transition import Transition, second_eigenvalue


def attention(
    seed: int, tokens: int = 40, width: int = 8, sharp: float = 2.0, heads: int = 3, dtype: torch.dtype = torch.float64
) -> Transition:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, heads, tokens, width, generator=generator, dtype=torch.float64) * sharp
    return Transition(query.to(dtype), key.to(dtype))


def formed(transition: Transition) -> torch.Tensor:
    """The matrices `[H, N, N]`, written out."""
    query, key = transition.query.double(), transition.key.double()
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if transition.mask is not None:
        logits = logits.masked_fill(~transition.mask, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def second(matrices: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvals(matrices).abs().sort(descending=True).values[..., 1]


def circling(turn: float = 2.3, width: int = 8, tokens: int = 48) -> Transition:
    """Tokens on a ring that look at those ahead: the second eigenvalues are a complex pair."""
    angle = torch.arange(tokens, dtype=torch.float64) / tokens * 2 * torch.pi
    place = torch.zeros(1, tokens, width, dtype=torch.float64)
    place[0, :, 0], place[0, :, 1] = 4 * angle.cos(), 4 * angle.sin()
    ahead = torch.zeros_like(place)
    ahead[0, :, 0], ahead[0, :, 1] = 4 * (angle + turn).cos(), 4 * (angle + turn).sin()
    return Transition(ahead, place)


def test_the_product_is_that_of_the_matrix_whatever_the_number_of_columns() -> None:
    transition = attention(0)
    for columns in (1, 8, 19):
        vectors = torch.randn(3, 40, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(transition.apply(vectors), formed(transition) @ vectors, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sharp", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("matrix", ["head", "mean"])
def test_it_is_that_of_the_formed_matrix(sharp: float, matrix: str) -> None:
    transition = attention(3, sharp=sharp)
    found = second_eigenvalue(transition, matrix=matrix, tolerance=1e-9, iterations=3000)
    matrices = formed(transition)
    expected = second(matrices if matrix == "head" else matrices.mean(0, keepdim=True))
    assert bool(found.converged.all())
    torch.testing.assert_close(found.modulus, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("block", [4, 5, None])
def test_a_complex_pair_is_found(block: int | None) -> None:
    transition = circling()
    values = torch.linalg.eigvals(formed(transition)[0])
    assert float(values[values.abs().argsort(descending=True)[1]].imag.abs()) > 0.3
    found = second_eigenvalue(transition, block=block, tolerance=1e-10, iterations=2000)
    torch.testing.assert_close(found.modulus, second(formed(transition)), rtol=0, atol=1e-9)


def test_float32_at_the_default_tolerance_is_close() -> None:
    transition = attention(5, dtype=torch.float32)
    found = second_eigenvalue(transition)
    assert bool((found.residual <= _transition.TOLERANCE).all())
    torch.testing.assert_close(found.modulus, second(formed(transition)), rtol=0, atol=1e-3)


def test_a_mask_hides_keys() -> None:
    base = attention(6)
    mask = torch.ones(1, 1, 40, dtype=torch.bool)
    mask[..., 30:] = False
    transition = Transition(base.query, base.key, mask.expand(3, 40, 40))
    found = second_eigenvalue(transition, tolerance=1e-9, iterations=3000)
    torch.testing.assert_close(found.modulus, second(formed(transition)), rtol=0, atol=1e-7)
    assert bool((found.modulus - second(formed(base))).abs().gt(1e-4).all())


def test_equal_rows_have_nothing_but_one_eigenvalue() -> None:
    transition = Transition(torch.zeros(2, 12, 8, dtype=torch.float64), torch.randn(2, 12, 8, dtype=torch.float64))
    assert float(second_eigenvalue(transition).modulus.max()) < 1e-9


def test_two_islands_never_mix() -> None:
    place = torch.zeros(1, 20, 8, dtype=torch.float64)
    place[0, :10, 0], place[0, 10:, 1] = 30, 30
    assert float(second_eigenvalue(Transition(place, place)).modulus) == pytest.approx(1, abs=1e-9)


def test_a_single_token_has_no_second() -> None:
    found = second_eigenvalue(attention(0, tokens=1))
    assert found.modulus.tolist() == [0, 0, 0]
    assert bool(found.converged.all())


def test_what_has_not_converged_says_so() -> None:
    found = second_eigenvalue(attention(3, sharp=4.0), block=4, tolerance=1e-12, iterations=3)
    assert found.iterations == 3
    assert not bool(found.converged.any())
    matrices = formed(attention(3, sharp=4.0))
    assert bool((found.residual > 0).all())
    assert bool((found.modulus <= matrices.abs().sum(-1).amax() + 1e-9).all())


def test_no_square_of_the_tokens_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of an iteration is smaller than one matrix."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        second_eigenvalue(attention(0, tokens=300, heads=1), iterations=5)
    assert 300 * 8 <= largest < 300 * 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix": "sum"}, "unknown matrix 'sum'"),
        ({"block": 3}, "block is 3; expected at least 4"),
        ({"tolerance": 0.0}, "tolerance 0.0"),
        ({"iterations": 0}, "0 iterations"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        second_eigenvalue(attention(0), **options)  # type: ignore[arg-type]


def test_a_row_without_a_value_is_an_error() -> None:
    base = attention(0)
    broken = base.query.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ConceptMapsError, match="rows without a value"):
        second_eigenvalue(Transition(broken, base.key))
