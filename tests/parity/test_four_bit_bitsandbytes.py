"""Four bits here and in bitsandbytes: every bit of codes and scales, and of what is decoded."""

import warnings

import numpy
import pytest

from minilora import quant
from minilora.quant import codes, scales
from minilora.quant.blocks import encode

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, and more than 32,768 scales, its sum is another
    yield torch
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bnb(torch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
        import bitsandbytes.functional as functional
    return functional


def same_bits(mine, theirs):
    theirs = theirs.numpy().reshape(mine.shape)
    assert mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_both_directions(torch, bnb, kind, blocksize, dtype, double):
    rng = numpy.random.default_rng(blocksize)
    for shape in ((1, 1), (3, 5), (64, 64), (7, 13), (300, 65), (33, 2048), (1, 63), (2, 4097)):
        W = rng.normal(size=shape) * rng.choice([1e-3, 1.0, 30.0])
        if shape[0] > 2:
            W[1], W[2] = 0.0, W[2] * 1e-5
        W = torch.tensor(W, dtype=getattr(torch, dtype))
        theirs, state = bnb.quantize_4bit(W, blocksize=blocksize, quant_type=kind, compress_statistics=double)
        mine = quant.FourBit.of(W.float().numpy(), kind, blocksize, double=double)
        same_bits(mine.codes, theirs)
        same_bits(mine.absmax, state.absmax)
        if double:
            same_bits(mine.nested_absmax, state.state2.absmax)
            same_bits(mine.nested_offset, state.offset)
        decoded = bnb.dequantize_4bit(theirs, state)
        # compared as numbers: of FP4's second zero, bitsandbytes' two versions differ in the sign
        assert torch.equal(torch.tensor(mine.dense()).to(decoded.dtype), decoded)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_at_the_middle_between_two_codes(torch, bnb, kind):
    borders, _ = codes.steps(kind)
    near = [numpy.nextafter(borders, numpy.float32(side)) for side in (-2.0, 2.0)]
    for scale in (1.0, 3.0, 0.1, 7e-3, 1e-30, 1e-38, 1e-41):
        W = (numpy.concatenate([[1.0], borders, *near, numpy.zeros(18)]) * scale).astype("float32")
        theirs, state = bnb.quantize_4bit(torch.tensor(W), blocksize=64, quant_type=kind)
        mine = encode(W, kind)
        same_bits(mine.codes, theirs)
        same_bits(mine.absmax, state.absmax)


def test_scales_in_8_bits(torch, bnb):
    rng = numpy.random.default_rng(1)
    same_bits(codes.dynamic_map(), bnb.create_dynamic_map())
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 33, 127, 256, 257, 513, 4097, 12_345, 32_767, 36_865, 99_999, 602_112):
        for size in (1e-3, 1.0, 1e4):
            given = torch.tensor(numpy.abs(rng.normal(size=n)) * size, dtype=torch.float32)
            offset = given.mean()
            theirs, state = bnb.quantize_blockwise(given - offset, blocksize=256)
            mine = scales.compress(given.numpy())
            same_bits(mine.offset, offset)
            same_bits(mine.codes, theirs)
            same_bits(mine.absmax, state.absmax)
            same_bits(scales.decompress(mine, 0, n, numpy), bnb.dequantize_blockwise(theirs, state) + offset)


def test_scales_that_are_all_equal_or_tiny(torch, bnb):
    for given in (numpy.full(300, 0.5), numpy.zeros(300), numpy.full(3, 1e-40), [1e-40] * 9 + [3e-40]):
        given = torch.tensor(given, dtype=torch.float32)
        theirs, state = bnb.quantize_blockwise(given - given.mean(), blocksize=256)
        mine = scales.compress(given.numpy())
        same_bits(mine.codes, theirs)
        same_bits(mine.absmax, state.absmax)
