"""Changes of a model's weights that leave its function as it is: which there are (a spec), and to make them.

axes.py has the grammar of a spec, spec.py what is done with one, architectures.py the specs of known networks, trace.py
finds the spec of another one, and proof.py tests a spec on a network.
"""

from refmerge.symmetry.axes import Block, Nested, Slices
from refmerge.symmetry.proof import changes
from refmerge.symmetry.spec import Perms, Spec, compose, invert

__all__ = ["Block", "Nested", "Perms", "Slices", "Spec", "changes", "compose", "invert"]
