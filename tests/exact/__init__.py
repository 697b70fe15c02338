"""Tasks whose right answer is known in closed form: what each algorithm converges to (docs/exact.md)."""
