"""Scores: one number per completion, from a reward model, the policy's own likelihood, or chance."""
