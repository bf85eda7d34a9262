"""An update as a value: factors, sums, compression, TIES and DARE, spectra, subspaces. No layer, no model."""
