"""Adapters as values to calculate with, from file to file: no model, and no matrix of a weight's size where factors do.

    matrices     an update of a file as `lora.LowRank`, and back
    bases        whether adapters can be calculated with, and belong to one base
    wholes       what an adapter replaces as a whole: heads, biases, rows of tokens
    outcome      what was done, layer by layer, with the error that it costs
    changes      what a fine-tuning changed: two checkpoints side by side
    extract      the low-rank adapter of it
    combine      several adapters into one
    resize       fewer ranks
    difference   the distance of two adapters
    convert      another program's dialect
"""
