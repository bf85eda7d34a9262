"""The network that tells the noise in an image: down to few places, and up again beside what was seen on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy

from ... import backend, ops
from ...engine import floating, shape_of
from ...errors import ConfigError, ShapeError
from ...nn.conv import Conv2d
from ...nn.embedding import Embedding
from ...nn.linear import check_size
from ...nn.module import Module
from ...nn.norm import GroupNorm
from ...ops.indices import integers
from ...tensor import Tensor
from ..checks import check_config
from ..group import Group, zeroed
from .blocks import PlaceAttention, ResnetBlock, TimestepEmbedding

__all__ = ["UNet", "UNetConfig"]

LONGEST = 1 << 20  # steps


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net, with the names that diffusers' UNet2DModel has for it.

    Parameters
    ----------
    sample_size : int
        Height and width of the images: a multiple of 2^(levels - 1).
    in_channels, out_channels : int
    block_out_channels : sequence of int
        Channels of each level, from the finest to the coarsest; between two levels height and width are halved.
    layers_per_block : int
        Residual blocks of a level on the way down. On the way up it has one more.
    attention_head_dim : int
        Divides the channels of the coarsest level, which alone has attention.
    norm_num_groups : int
        Divides all channels.
    norm_eps : float
    classes : int, optional
        Labels from 0 to classes - 1. None: the model takes no labels.
    guided : bool
        With classes, have one label more, `any_class`, for "any of them".

    Raises
    ------
    ConfigError
        With one line for every field that is out of range.

    Examples
    --------
    >>> UNetConfig(sample_size=6, block_out_channels=(8, 16, 16))
    Traceback (most recent call last):
    minilora.errors.ConfigError: UNetConfig: sample_size must be a multiple of 4 for 3 levels, got 6
    """

    sample_size: int = 8
    in_channels: int = 1
    out_channels: int = 1
    block_out_channels: Sequence[int] = (32, 64)
    layers_per_block: int = 1
    attention_head_dim: int = 16
    norm_num_groups: int = 8
    norm_eps: float = 1e-5
    classes: int | None = None
    guided: bool = True

    def __post_init__(self) -> None:
        sizes = ["sample_size", "in_channels", "out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups"]
        check_config(self, sizes + ["classes"] * (self.classes is not None), ["norm_eps"])
        channels = self.block_out_channels
        if not isinstance(channels, (tuple, list)) or not channels:
            raise ConfigError(f"UNetConfig: block_out_channels must hold the channels of each level, got {channels!r}")
        problems = []
        for i, n in enumerate(channels):
            try:
                check_size(f"block_out_channels[{i}]", n)
            except ConfigError as error:
                problems.append(str(error))
        if not problems:
            object.__setattr__(self, "block_out_channels", tuple(int(n) for n in channels))
            problems = self._problems()
        if problems:
            raise ConfigError("\n  ".join([f"UNetConfig: {problems[0]}", *problems[1:]]))

    def _problems(self) -> list[str]:
        channels, halved = self.block_out_channels, 2 ** (len(self.block_out_channels) - 1)
        problems = []
        if self.sample_size % halved:
            problems.append(f"sample_size must be a multiple of {halved} for {len(channels)} levels, got {self.sample_size}")
        problems += [f"block_out_channels[{i}] must be a multiple of norm_num_groups, got {n} and {self.norm_num_groups}"
                     for i, n in enumerate(channels) if n % self.norm_num_groups]
        if channels[0] % 2:
            problems.append(f"block_out_channels[0] must be even: half of the waves are sines, got {channels[0]}")
        if channels[-1] % self.attention_head_dim:
            problems.append(f"attention_head_dim must divide the last of block_out_channels, got {self.attention_head_dim} "
                            f"and {channels[-1]}")
        if not isinstance(self.guided, bool):
            problems.append(f"guided must be True or False, got {self.guided!r}")
        return problems

    @property
    def any_class(self) -> int | None:
        """The label that says nothing of the class; None where there is none."""
        return self.classes if self.guided else None

    @property
    def embedded(self) -> int:
        """How many labels there are, `any_class` among them."""
        return 0 if self.classes is None else self.classes + self.guided


class UNet(Module):
    """Images (N, in_channels, S, S), steps (N,) and labels (N,) to the noise in the images.

    Parameters
    ----------
    config : UNetConfig
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws the weights, on the host, so that one seed gives one model on every device.

    Attributes
    ----------
    conv_in : Conv2d
    time_embedding : TimestepEmbedding
    class_embedding : Embedding or None
    down_blocks : list of Group
        Of each level: resnets, attentions in the last level, and downsamplers, one with a strided `conv`, but in the last.
    mid_block : Group
        Two resnets, and one of attentions between them.
    up_blocks : list of Group
        From the coarsest level to the finest: resnets, attentions in the first, and upsamplers, one with a `conv` behind the
        nearest neighbours, but in the last.
    conv_norm_out, conv_out

    Notes
    -----
    The modules have the names, and compute what they compute, of diffusers' UNet2DModel with DownBlock2D and UpBlock2D, and
    AttnDownBlock2D and AttnUpBlock2D in the coarsest level, `resnet_time_scale_shift` "default" and `num_class_embeds`: so
    adapters have in their files the names that such models have there.

    The last convolution of each residual block, the output of attention and conv_out start at 0 (Ho et al., their code): the
    model starts with the noise 0, and each block as the identity. Other weights start as their layers do.

    Source: Ho, Jain and Abbeel 2020, arXiv 2006.11239, appendix B, after Ronneberger et al. 2015, arXiv 1505.04597.

    Examples
    --------
    >>> config = UNetConfig(sample_size=4, block_out_channels=(8, 16), norm_num_groups=4, classes=10)
    >>> model = UNet(config, rng=0)
    >>> model(numpy.zeros((2, 1, 4, 4), "float32"), [0, 999], [3, 7]).shape
    (2, 1, 4, 4)
    """

    class_embedding: Embedding | None

    def __init__(self, config: UNetConfig, *, dtype: Any = "float32", rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        self.config = config
        channels = list(config.block_out_channels)
        made: dict[str, Any] = dict(dtype=dtype, rng=rng)
        inner, norm = 4 * channels[0], (config.norm_num_groups, config.norm_eps)
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1, **made)
        self.time_embedding = TimestepEmbedding(channels[0], inner, **made)
        self.class_embedding = Embedding(config.embedded, inner, **made) if config.classes is not None else None
        self.down_blocks, self.up_blocks = [], []
        now, seen = channels[0], [channels[0]]  # channels of what is computed, and of what waits beside it for the way up
        for level, out in enumerate(channels):
            resnets = []
            for _ in range(config.layers_per_block):
                resnets.append(ResnetBlock(now, out, inner, *norm, **made))
                now = out
                seen.append(now)
            last = level == len(channels) - 1
            down = [] if last else [Group(conv=Conv2d(now, now, 3, stride=2, padding=1, **made))]
            seen += [now] * len(down)
            self.down_blocks.append(Group(resnets=resnets, attentions=self._attentions(len(resnets) * last, made),
                                          downsamplers=down))
        self.mid_block = Group(resnets=[ResnetBlock(now, now, inner, *norm, **made) for _ in range(2)],
                               attentions=self._attentions(1, made))
        for level, out in enumerate(reversed(channels)):
            resnets = []
            for _ in range(config.layers_per_block + 1):
                resnets.append(ResnetBlock(now + seen.pop(), out, inner, *norm, **made))
                now = out
            up = [] if level == len(channels) - 1 else [Group(conv=Conv2d(now, now, 3, padding=1, **made))]
            self.up_blocks.append(Group(resnets=resnets, attentions=self._attentions(len(resnets) * (level == 0), made),
                                        upsamplers=up))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, now, config.norm_eps, dtype=dtype)
        self.conv_out = zeroed(Conv2d(now, config.out_channels, 3, padding=1, **made))

    def _attentions(self, count: int, made: dict[str, Any]) -> list[PlaceAttention]:
        """So many for the coarsest level."""
        config = self.config
        return [PlaceAttention(config.block_out_channels[-1], config.attention_head_dim, config.norm_num_groups,
                               config.norm_eps, **made) for _ in range(count)]

    def forward(self, x: Any, t: Any, labels: Any = None) -> Tensor:
        """The noise in images.

        Parameters
        ----------
        x : Tensor, shape (N, in_channels, S, S)
        t : array or list of int, shape (N,)
            Best given on the host, like the labels.
        labels : array or list of int, shape (N,)
            Of a model with classes.

        Returns
        -------
        Tensor, shape (N, out_channels, S, S)

        Raises
        ------
        ShapeError, DTypeError, OutOfRangeError
            If an input does not fit.
        ConfigError
            If labels are missing, or the model takes none.
        """
        e = self._told(floating(x), t, labels)
        h = self.conv_in(x)
        seen = [h]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                h = resnet(h, e)
                h = block.attentions[i](h) if block.attentions else h
                seen.append(h)
            for sampler in block.downsamplers:
                h = sampler.conv(h)
                seen.append(h)
        h = self.mid_block.resnets[0](h, e)
        h = self.mid_block.resnets[1](self.mid_block.attentions[0](h), e)
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                h = resnet(ops.concatenate([h, seen.pop()], axis=1), e)
                h = block.attentions[i](h) if block.attentions else h
            for sampler in block.upsamplers:
                h = sampler.conv(ops.upsample(h))
        return self.conv_out(ops.silu(self.conv_norm_out(h)))  # type: ignore[no-any-return]

    def _told(self, x: Any, t: Any, labels: Any) -> Tensor:
        """What every residual block is told: the vector of step and class, after a SiLU, (N, 4 block_out_channels[0])."""
        config, shape = self.config, shape_of(x)
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if shape[1:] != expected:
            raise ShapeError(f"expected images (N, {', '.join(map(str, expected))}), got {shape}. Is the axis of channels "
                             "missing, or is the image of another size?")
        if (self.class_embedding is None) != (labels is None):
            raise ConfigError("this model has classes: give the label of each image" if labels is None else
                              "this model takes no labels: it was made without classes")
        t = integers("step", t, LONGEST)
        given = {"steps": t.shape}
        if labels is not None:
            labels = integers("label", labels, config.embedded)
            given["labels"] = labels.shape
        wrong = [f"{what} {got}" for what, got in given.items() if got != shape[:1]]
        if wrong:
            raise ShapeError(f"expected one for each of the {shape[0]} images, got {' and '.join(wrong)}")
        e = self.time_embedding(backend.to_host(t), x.dtype)
        if self.class_embedding is not None:
            e = e + self.class_embedding(labels)
        return ops.silu(e)
