"""Small networks as pure functions of their parameters, in the array API: what a spec is proved on, and examples run on.

Each module has `forward(params, batch, taps=None, ...)`, which gives the outputs of a batch, and `init(rng, ...)`, which
draws parameters. Names of tensors and layouts of weights are those of the checkpoints that people have: torchvision's,
timm's and transformers'. Arrays are of any library; gradients go through where the library has them.

`refmerge.nets.torch` makes such a function of a module of torch or transformers.

taps: a dictionary that a forward pass fills with matrices of one row for each sample, or for each place of one, and one
column for each unit:

- under the name of a weight (`conv1.weight`), what its layer gives, before any activation;
- under the name of a permutation of the architecture's spec (`layer1`), what those units give to whoever reads them; if they
  are read in several places, one below the other; a unit that is several entries has a row for each of them. For a
  permutation that is owned there is an axis for each owner in front.
"""
