"""Watching a run: the metrics table, the recorder, W&B, the console, throughput and the report."""
