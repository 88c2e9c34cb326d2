"""Changes of a model's weights that leave its function as it is: which there are (a spec), and to make them.

    from refmerge.symmetry import Block, Nested, Slices, Spec, compose, invert

refmerge/symmetry/axes.py has the grammar of a spec, refmerge/symmetry/spec.py what is done with one.
"""

from refmerge.symmetry.axes import Block, Nested, Slices
from refmerge.symmetry.spec import Perms, Spec, compose, invert

__all__ = ["Block", "Nested", "Perms", "Slices", "Spec", "compose", "invert"]
