"""Small networks as pure functions of their parameters, in the array API: what a spec is proved on, and examples run on."""
