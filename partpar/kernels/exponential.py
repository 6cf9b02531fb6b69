r"""The exponential function for the inside of Numba loops."""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload


def exponential(value: float) -> float:
    r"""``exp`` of a number that is not positive; in float32 by a polynomial that the compiler can
    vectorise.
    """
    return float(np.exp(value))


# Numba wants the two signatures below alike, annotations included.
@overload(exponential)
def _exponential(value: Any) -> Any:
    def exact(value: Any) -> Any:
        return np.exp(value)

    def polynomial(value: Any) -> Any:
        # exp(v) = 2^k * exp(r), r in [-ln2/2, ln2/2]; ln2 in two parts so that r is exact; error below 2 ulp.
        bounded = value if value > np.float32(-87.0) else np.float32(-87.0)
        k = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
        r = bounded - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        power = np.int32((np.int64(k) + 127) << 23).view(np.float32)
        if value < np.float32(-87.0):
            return np.float32(0.0)
        return p * power if value == value else value

    return polynomial if value == types.float32 else exact
