"""How long a step of OPT-13B takes on an A100: a plain roofline, the same for every system.

A step reads the weights once and multiplies each row with them, whichever takes longer, then reads
the K and V that its rows attend to. The shares of the peaks are what good kernels reach; nothing
here was fitted to the paper.
"""

WEIGHTS = 26e9  # bytes, float16
KV_OF_TOKEN = 819_200  # bytes: K and V, 40 layers, 5,120 wide, float16
OF_ROW = 26e9  # floating-point operations: two for each parameter
BANDWIDTH = 0.75 * 1.555e12  # bytes/s
SPEED = 0.45 * 312e12  # operations/s
OVERHEAD = 0.002  # s, of the host


def seconds(rows: int, context: int) -> float:
    """A step of `rows` tokens whose attention reads `context` tokens of K and V."""
    matrices = max(WEIGHTS / BANDWIDTH, rows * OF_ROW / SPEED)
    return OVERHEAD + matrices + context * KV_OF_TOKEN / BANDWIDTH
