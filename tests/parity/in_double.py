"""transformers wholly in float64, so that figures of 1e-10 can be asked of models in whose code some places say float32."""
import contextlib
import warnings

import pytest


@contextlib.contextmanager
def in_double(torch):
    """Within it, whoever says torch.float32 gets float64: norms, rotary angles, masks. (Tensor.float() stays what it is.)"""
    names = {"float32": torch.float32, "float": torch.float}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for name in names:
        setattr(torch, name, torch.float64)
    try:
        yield
    finally:
        for name, dtype in names.items():
            setattr(torch, name, dtype)
        torch.set_default_dtype(default)


def import_transformers():
    """transformers without its warnings and notes; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        return transformers
