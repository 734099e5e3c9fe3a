"""Services of a long-running command: files, metrics, progress, terminal output, signals, memory and several processes."""
