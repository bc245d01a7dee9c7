"""How the conformance vectors are made: `artifact` has the means, `valid` and `invalid` the recipes."""
