"""A verifiable toy language in which the whole method can be run and checked."""
