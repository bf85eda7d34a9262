"""The derivation of `gradient` where the layer is another: convolution, embedding, fused projection, DoRA, a mixed batch."""
