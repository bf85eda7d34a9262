"""Pictures of graphs: what was computed from what, what backward keeps for it, and the gradients that flow back."""

from .graph import Edge, Graph, Node
from .picture import Drawing, draw

__all__ = ["Drawing", "Edge", "Graph", "Node", "draw"]
