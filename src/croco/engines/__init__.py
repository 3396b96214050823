"""Engines that sample and score. `base` is what they promise; each other module is one way to keep it."""
