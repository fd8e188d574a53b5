"""PPOTrainer beside TRL 1.12.0's, the last that has PPO; see ``benchmarks/ppo_trainer/__main__.py``."""
