"""Every number of 16 bits, widened by the CPU's version and by the reference: the same bits."""

import numpy
import pytest

from minilora import versions
from minilora.kernels.cpu import halves as cpu_halves
from minilora.quant.halves import widened

ALL = numpy.arange(1 << 16, dtype="uint16")


def same(one, other):
    assert one.dtype == other.dtype == "float32" and one.shape == other.shape
    numpy.testing.assert_array_equal(numpy.ascontiguousarray(one).view("uint32"), numpy.ascontiguousarray(other).view("uint32"))


def test_it_is_the_version_of_the_cpu():
    assert versions.load("cpu")[widened] is cpu_halves.widened_in_blocks


@pytest.mark.parametrize("block", [1, 700, 1 << 16])
@pytest.mark.parametrize("finite", [True, False])
def test_every_number_has_its_bits(block, finite, monkeypatch):
    monkeypatch.setattr(cpu_halves, "BLOCK", block)
    codes = ALL[(ALL & 0x7c00 != 0x7c00) | (not finite)].reshape(-1, 64).view("float16")
    rng = numpy.random.default_rng(0)
    for some in (codes, codes.T, rng.permutation(codes.reshape(-1)).reshape(codes.shape), codes[::3, 5:40], codes[:, ::-1]):
        same(cpu_halves.widened_in_blocks(some), some.astype("float32"))


def test_bfloat16_is_the_upper_half():
    codes = ALL.reshape(256, 256)
    for some in (codes, codes.T, codes[3:9, ::2]):
        expected = (some.astype("uint32") << 16).view("float32")
        same(cpu_halves.widened_in_blocks(some), expected)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5,), (2, 3, 4, 5), (0,), (1, 1)])
def test_shapes(shape):
    codes = numpy.random.default_rng(1).normal(size=shape).astype("float16")
    same(cpu_halves.widened_in_blocks(codes), codes.astype("float32"))


def test_what_lies_at_an_odd_address_and_may_not_be_written():
    memory = numpy.random.default_rng(2).normal(size=24).astype("float16").tobytes()
    codes = numpy.ndarray((4, 6), "float16", b"?" + memory, 1)
    assert not codes.flags.aligned and not codes.flags.writeable
    same(cpu_halves.widened_in_blocks(codes), numpy.array(codes).astype("float32"))
    same(cpu_halves.widened_in_blocks(codes.T), numpy.array(codes.T).astype("float32"))
