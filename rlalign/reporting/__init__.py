"""What a run leaves for people: metrics.jsonl, TensorBoard, picture grids, alarms, report.html, the progress bar."""
