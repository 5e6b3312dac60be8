"""Speed and memory of `hellm` beside its peers, measured in the same run: see README.md."""
