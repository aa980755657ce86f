"""`python -m almost_jax` is `almost-jax`."""

from almost_jax.cli import main

if __name__ == "__main__":
    main()
