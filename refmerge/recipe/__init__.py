"""Recipes: YAML text -> validated recipe -> what is merged, with the parameters of every tensor.

A recipe with `refmerge: 1` at its top has the papers' semantics; one without it is mergekit's YAML and gets mergekit's.
"""

from refmerge.recipe.plan import Recipe, Resolved, describe, load_recipe, parse_recipe, resolve
from refmerge.recipe.schema import schema_json

__all__ = ["Recipe", "Resolved", "describe", "load_recipe", "parse_recipe", "resolve", "schema_json"]
