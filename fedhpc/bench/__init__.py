"""Speed, as ratios measured in one run on one machine: `python -m fedhpc.bench`.

Whatever is compared runs interleaved, one thread per process; figures are medians over the repeats, on a CPU of CPU
seconds, which a busy machine disturbs least.
"""
