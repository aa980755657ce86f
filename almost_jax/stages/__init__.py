"""The stages of the method, one file each; they meet only through records and checkpoints on disk."""
