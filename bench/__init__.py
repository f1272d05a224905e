"""Benchmarks: ours and the peers, side by side in one run. Results with their commands are in RESULTS.md."""
