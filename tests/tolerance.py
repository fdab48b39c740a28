"""How far two right computations of one value may lie apart."""
import math

import torch

FACTOR = 4


def bound(terms: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> float:
    """Limit of the difference between two sums of `terms` products of size `scale`, each in `dtype` and in an order
    that processor and BLAS choose.

    Each rounding errs by up to eps / 2 of its value, and `terms` independent ones add up to eps / 2 * sqrt(terms). The
    tests take the largest of many entries, of either sum, which FACTOR covers; measured differences are at most a
    quarter of the limit, on AVX-512, AVX2 and SSE forms of the libraries.
    """
    return FACTOR * torch.finfo(dtype).eps * math.sqrt(terms) * scale
