"""ALMoST in JAX: aligning large language models through synthetic feedback (Kim et al., 2023, arXiv 2305.13735)."""

__version__ = "0.1.0"
