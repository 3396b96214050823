"""From scores to preference pairs: pools, selection rules, guards, and the stage that joins them."""
