"""Measures fedhpc's speed as ratios, in one run on one machine: `python -m fedhpc.bench`.

Things that are compared run interleaved, with one thread per process. Figures are medians over the repeats; on a CPU
they are of CPU seconds, which other programs on the machine disturb least.
"""
