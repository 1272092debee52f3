"""The affine regions of a model: found in the evidence, reduced to chains and joins, folded to one form."""
