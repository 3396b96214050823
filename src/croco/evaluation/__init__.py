"""How good a policy is: verified or scored completions, bootstrap statistics, the results table."""
