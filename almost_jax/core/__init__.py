"""Arrays only: the model, losses, PPO mathematics and the train step. No files, tokenizers, logging or environment."""
