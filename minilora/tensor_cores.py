"""TF32: products of float32 matrices on a GPU's tensor cores, by request.

By default a product of float32 matrices is one of float32: its factors keep their 24 bits. Tensor cores, which are several
times as fast, take factors of fewer. In TF32 a factor keeps the 8 bits of float32's exponent, so that nothing overflows, and of
the number itself 10 bits behind the point in place of 23; what is multiplied and added up is float32 again:

    y_nk = sum_i t(x_ni) t(w_ki)          |t(x) - x| <= e |x|,  e = 2^-10 (cut off; 2^-11 where it is rounded to nearest)

Both factors of a term are changed, each by a share of e at most, so that to the first order in e

    |y_nk - exact| <= 2 e sum_i |x_ni| |w_ki|          2 e = 0.2 %, if all errors have one sign

Errors with signs of their own grow with sqrt(n), and so does the sum of terms with signs: whatever n is, y is about 0.03 % off
in norm where factors are rounded to nearest, and 0.08 % where they are cut off (which one a card does, cuBLAS does not say).
float16 and bfloat16 numbers, widened, are exact in TF32, as are whole numbers up to 2048.

It holds for the products that operations ask cuBLAS for, forward and backward, and for nothing else: not for float64, sums,
norms, softmax, losses and optimizers, nor for the thin products of adapters that kernels compute (r <= 16 and few rows),
which wait for memory anyway; and not where a result is kept in the place of what it was made of. Merging, unmerging and the
algebra of updates multiply by `Device.exact`, in true float32 whatever is chosen here.
"""

from __future__ import annotations

import os

from .choice import Choice
from .errors import ConfigError

__all__ = ["TF32", "refuse", "tf32"]


def tf32() -> bool:
    """Whether GPUs multiply float32 matrices in TF32: as `use` chose, else as MINILORA_TF32 says, else as CUPY_TF32, else no.

    Raises
    ------
    ConfigError
        If nobody has chosen, and MINILORA_TF32 is none of on, off, 1, 0.

    Examples
    --------
    >>> import minilora
    >>> minilora.backend.tf32()
    False
    """
    return TF32.on()


def by_cupy() -> bool:
    """Whether CuPy's own products are in TF32, by CuPy's own word. It reads it once."""
    return os.environ.get("CUPY_TF32", "0") == "1"


# Devices choose their products after a change (`Device.renew`).
TF32 = Choice("MINILORA_TF32", by_cupy,
              "Type export MINILORA_TF32=on for products on tensor cores, unset MINILORA_TF32 for true float32")


def refuse(device: str, by_name: bool, own_products: bool) -> None:
    """Raise `ConfigError` where a device has been chosen that cannot do what is asked of its products.

    Parameters
    ----------
    device : str
    by_name : bool
        Whether TF32 was asked for in the same call that named the device.
    own_products : bool
        Whether its products go by minilora's own binding to cuBLAS.
    """
    if device == "cpu":
        if by_name:
            raise ConfigError("tf32=True asks for the tensor cores of a GPU, and the CPU has none: its products are those of "
                              "float32. Type minilora.use('cpu') for true float32 there, minilora.use('gpu', tf32=True) for a "
                              "GPU, or minilora.use('auto', tf32=True), which takes TF32 if it finds a GPU")
        return
    if own_products or not (tf32() or by_cupy()):
        return
    cause = "was asked for" if tf32() else "is off, but CUPY_TF32=1 is set"
    raise ConfigError(f"TF32 {cause}, and products on the {device} are CuPy's own here (kernels are off, or no cuBLAS was "
                      "found), which take CUPY_TF32=1 for some products alone, those of merging among them. Type "
                      f"minilora.use({device!r}, kernels=True) for TF32 by minilora's products, or "
                      f"unset CUPY_TF32 MINILORA_TF32 and minilora.use({device!r}, tf32=False) for true float32")
