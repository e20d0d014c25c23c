"""The leading part of a matrix by singular value decomposition, as the two factors that a low-rank
update starts from.

M ~ U_r S_r V_r^T (Eckart and Young, 1936: no matrix of rank r is nearer) becomes B A with A =
sqrt(S_r) V_r^T and B = U_r sqrt(S_r).
"""

import torch
from jaxtyping import Float
from torch import Tensor

OVERSAMPLED = 8  # columns beyond r that the randomised decomposition looks at


def principal_factors(
    matrix: Float[Tensor, "d_out d_in"], r: int, svd_niter: int | None, seed: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """(A, B) in float32 on the matrix's device: B A is the principal part of rank r, and both have
    the singular values' roots.

    Without `svd_niter` by the full decomposition, where `seed` decides nothing; else by a
    randomised one with so many iterations. Singular vectors come in pairs of free sign: here the
    entry of largest magnitude of each column of B is positive, on every machine.
    """
    wide = matrix.float()
    if svd_niter is None:
        u, values, vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        u, values, vh = _randomised_svd(wide, r, svd_niter, seed)
    u, root, vh = u[:, :r], values[:r].sqrt(), vh[:r]
    signed = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)).squeeze(0) < 0, -root, root)
    return signed[:, None] * vh, u * signed


def _randomised_svd(
    matrix: Float[Tensor, "d_out d_in"], r: int, niter: int, seed: int
) -> tuple[Float[Tensor, "d_out q"], Float[Tensor, " q"], Float[Tensor, "q d_in"]]:
    """U, S, V^T of the matrix's part in the span of its products with random vectors (Halko et al.,
    2011, arXiv 0909.4061, algorithms 4.4 and 5.1). They are drawn on the CPU from a generator of
    their own, so that a seed means the same vectors whatever the device.
    """
    columns = min(r + OVERSAMPLED, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(
        matrix.shape[1], columns, generator=generator, dtype=torch.float32, device="cpu"
    )
    basis = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
    for _ in range(niter):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, values, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, values, vh
