"""The laboratory: a small multilingual world, a policy that fails in it, and a reward model, all shipped."""
