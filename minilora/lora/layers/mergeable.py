"""MergeableLayer: a layer whose updates can become part of its weight, and leave it again without a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import nn
from ...engine import is_recording
from ...errors import StateError
from ...tensor import Parameter

if TYPE_CHECKING:
    from ..merging.arithmetic import Update
    from ..merging.report import MergeReport
    from ..merging.way_back import WayBack

__all__ = ["MergeableLayer", "missing"]

Array = Any


def missing(layer: nn.Module, name: str) -> TypeError:
    """The error of a layer whose class leaves out what it has to define."""
    return TypeError(f"{type(layer).__name__} has no {name}: define {name} in the subclass")


class MergeableLayer(nn.Module):
    """The part of `base.AdaptedLayer` that answers what merging asks: see `merging.mergeable.Mergeable`.

    Attributes
    ----------
    weight : Parameter
    bias : Parameter or None
    merged : bool
    """

    weight: Parameter
    bias: Parameter | None
    way_back: WayBack | None = None  # while merged: what unmerge needs

    def updating(self) -> list[Parameter]:
        """The parameters of what merging adds."""
        raise missing(self, "updating")

    # What of them makes an update of the stored weight stands in `update`: read when somebody merges, which most never do.

    def stored_update(self: Any) -> Update:
        from .update import update_of

        return update_of(self)

    def changes_bias(self: Any) -> bool:
        return any(self.bias_update(self.adapters[name]) is not None for name in self.active)

    def updated_bias(self: Any) -> Array | None:
        from .update import merged_bias

        return merged_bias(self)

    def delta(self: Any) -> Array:
        """What merging adds to the weight, in its shape: for plain adapters the sum of w s B A."""
        from .update import delta_of

        return delta_of(self)

    @property
    def merged(self) -> bool:
        """Whether the active updates are part of `weight` at present."""
        return self.way_back is not None

    def merge(self: Any, *, rounding: str = "nearest", seed: int = 0, allow_lossy: bool = False) -> MergeReport:
        """Make the active updates part of the weight: W <- W + D. All or nothing; `unmerge` restores the original bits.

        Parameters, report and errors are those of `lora.merge`, which does the same for all layers of a model.

        Raises
        ------
        StateError
            If merged already, if the update or the sum is not finite, or if rounding would swallow the update: then nothing has
            changed.

        Notes
        -----
        While merged, the layer keeps instead of a second W what leads back from W': mostly less than 1 bit for each weight. The
        arithmetic is the host's: on a GPU the weight is copied there and back (sync points).
        """
        from ..merging.transaction import merge_layers

        return merge_layers(self, {"": self}, rounding=rounding, seed=seed, allow_lossy=allow_lossy)

    def unmerge(self: Any) -> None:
        """Put the original weight back, bit for bit.

        Raises
        ------
        StateError
            If the layer is not merged, or the merged weight was changed since.
        """
        from ..merging.transaction import unmerge_layers

        unmerge_layers({"": self})

    def refuse_merged_use(self: Any) -> None:
        """Raise `StateError` where the merged weight would give another result than the one that is wanted."""
        if self.running:
            raise StateError("this layer was merged while lora.disabled or lora.mixed is open in this thread: its weight holds "
                             "one update for all rows. Call lora.unmerge(model), and merge when no context is open")
        if not (self.training and is_recording()):
            return
        if any(p.trainable for p in self.updating()):
            raise StateError("training while merged: lora_A and lora_B take no part in the forward pass, so they would get no "
                             "gradient. Call unmerge() first, or eval() to run the merged layer")

    def holds_merged(self) -> bool:
        return self.merged

    def check_movable(self) -> None:
        if self.merged:
            raise StateError("this layer is merged: its weight holds the update, and lora_A and lora_B hold it too. Call "
                             "unmerge() first, or lora.bake(model) to keep the merged weights for good")
