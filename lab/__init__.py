"""Builds what the package ships as its lab: the corpus, the policy, the reward model, and the models of the baselines.

Not part of the package. `python -m lab build` (or `make lab-build`) makes all of it again from nothing.
"""
