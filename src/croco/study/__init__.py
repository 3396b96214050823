"""One experiment under several seeds: run it, pool it, and judge claims by what came out."""
