"""A line of metrics.jsonl."""

RECORD = {
    "step": 30,
    "tokens": 960,
    "loss": 2.34567,
    "lr": 9.9e-4,
    "grad_norm": 1.234,
    "ms": 50.0,
    "tokens_per_second": 12345.6,
    "mfu": 0.4213,
    "memory": 3 << 20,
}
