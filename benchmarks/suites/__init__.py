"""The suites of ``python -m benchmarks``, one module each. :data:`SUITES` is the one list of those that measure."""

from benchmarks.suites import accuracy, kernels, latency, memory, throughput, waterfall

# In the order in which the report shows them.
SUITES = (throughput.SUITE, latency.SUITE, memory.SUITE, kernels.SUITE, waterfall.SUITE, accuracy.SUITE)
