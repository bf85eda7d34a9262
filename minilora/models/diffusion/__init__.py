"""Images out of noise: the network, the noise, its loss and a sampler."""
