"""Commands of the command line that need more than a few lines; `almost_jax.cli` names them."""
