"""The laboratory: two small multilingual worlds, policies that fail in them, and reward models, all shipped."""

# What each world asks and how it judges, as fingerprints know it; tests/lab/test_world.py says when it must change.
WORLDS = {"lab": "37ae4e5d22916a99", "lab:lists": "a1e0e3213a3d1c22"}
