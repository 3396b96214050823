"""The laboratory: a small multilingual world, a policy that fails in it, and a reward model, all shipped."""

# What the world asks and how it judges, as fingerprints know it; tests/lab/test_world.py says when it must change.
WORLD = "37ae4e5d22916a99"
