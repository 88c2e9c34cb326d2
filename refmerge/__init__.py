"""refmerge: the reference implementation of model merging."""
