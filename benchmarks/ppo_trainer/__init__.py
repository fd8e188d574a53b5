"""PPOTrainer beside that of TRL 1.12.0, the last with PPO; ``__main__.py`` has the command."""
